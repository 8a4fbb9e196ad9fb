"""Labels alone, KD and IPWD on handwritten digits, for two students of one teacher.

    python -m ipwd_jax.sweep --config=configs/sweeps/digits.py --out=runs/digits

The three seeds of a run train in one program.
"""

from pathlib import Path

from ipwd_jax.api import load_config

DIGITS = Path(__file__).parents[1] / "digits_ipwd.py"
PAIRS = (("resnet20", "resnet8"), ("resnet20", "resnet14"))
METHODS = ("ce", "kd", "ipwd")


def get_runs():
    """Every method for both pairs."""
    return [{"config": _config(method, *pair)} for pair in PAIRS for method in METHODS]


def _config(method, teacher, student):
    config = load_config(f"{DIGITS}:{teacher},{student}", seeds=(0, 1, 2))
    if method != "ipwd":
        config.name = f"digits_{method}_{teacher}_{student}"
        config.loss.cls, config.weighting.name = 0.0, "uniform"
    if method == "ce":
        config.name, config.teacher.name = f"digits_ce_{student}", ""
        config.loss.update({"ce": 1.0, "kd": 0.0})
    return config
