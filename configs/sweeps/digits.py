"""Labels alone, KD and IPWD on handwritten digits, for two students of one teacher.

    python -m ipwd_jax.sweep --config=configs/sweeps/digits.py --out=runs/digits
    python -m ipwd_jax.sweep --config=configs/sweeps/digits.py:5 --out=runs/digits

The seeds of a run, three unless a number follows the colon, train in one program.
"""

from pathlib import Path

from ipwd_jax.api import load_config
from ipwd_jax.errors import UserError

DIGITS = Path(__file__).parents[1] / "digits_ipwd.py"
PAIRS = (("resnet20", "resnet8"), ("resnet20", "resnet14"))
METHODS = ("ce", "kd", "ipwd")


def get_runs(count="3"):
    """Every method for both pairs.

    Args:
        count: the number of seeds.
    """
    if not (count.isdigit() and int(count) > 0):
        raise UserError(f"this sweep takes a number of seeds after the colon, found {count!r}")
    seeds = tuple(range(int(count)))
    return [{"config": _config(method, seeds, *pair)} for pair in PAIRS for method in METHODS]


def _config(method, seeds, teacher, student):
    config = load_config(f"{DIGITS}:{teacher},{student}", seeds=seeds)
    if method != "ipwd":
        config.name = f"digits_{method}_{teacher}_{student}"
        config.loss.cls, config.weighting.name = 0.0, "uniform"
    if method == "ce":
        config.name, config.teacher.name = f"digits_ce_{student}", ""
        config.loss.update({"ce": 1.0, "kd": 0.0})
    return config
