"""What IPWD's weights contribute, and which ratio they should have: small networks on CIFAR-100.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_small.py --out=runs/ratio
    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_small.py:2.31,1.87 --out=runs/ratio

Teachers and students train for 30 epochs, an eighth of the paper's 240, and the learning rate falls
after an eighth of its milestones, rounded. The three seeds of a run train in one program. A missing
CIFAR-100 is downloaded.

A weight larger than 1 strengthens distillation as a whole, so one of the arms multiplies the loss
of KD by a constant, which should be IPWD's mean weight. That is not known before the arms of IPWD
have been trained: their `result.json` has it as `weight_mean`. So the first command takes 2, the
weight of a sample that both heads explain equally well, and the second command adds an arm for each
of the constants that follow the colon. The scores without standardisation have no bound on their
ratio; if such an arm diverges, it is reported as failed, and the others are trained.
"""

from pathlib import Path

from ipwd_jax.api import load_config
from ipwd_jax.errors import UserError

BASELINES = Path(__file__).parents[1] / "cifar_baselines.py"
PAIRS = (("resnet8x4", "resnet8"), ("resnet32", "resnet20"))
EPOCHS, MILESTONES = 30, (19, 23, 26)  # 240, and 150, 180 and 210, divided by 8


def get_runs(constants="2"):
    """All arms of the first pair, then those of the second.

    Args:
        constants: the constant weights, with commas between them.
    """
    runs = []
    for pair in PAIRS:
        for name, (method, changes) in _arms(constants).items():
            runs.append({"config": _config(name, method, changes, pair)})
    return runs


def _arms(constants):
    """Name -> method of configs/cifar_baselines.py, and the settings that differ from it."""
    try:
        weights = [float(constant) for constant in constants.split(",")]
    except ValueError:
        raise UserError(f"this sweep takes numbers after the colon, found {constants!r}") from None
    a, b = {"weighting__ratio": "A"}, {"weighting__ratio": "B"}
    raw = {"weighting__standardize": False}
    return {
        "ce": ("ce", {}),
        "kd": ("kd", {}),
        **{f"kd_times{w:g}": ("kd_constant", {"weighting__constant": w}) for w in weights},
        "kd_cls": ("kd", {"loss__cls": 1.0}),
        "wsld": ("wsld", {}),
        "ipwd_A": ("ipwd", a),
        "ipwd_B": ("ipwd", b),
        "ipwd_A_raw": ("ipwd", a | raw),
        "ipwd_B_raw": ("ipwd", b | raw),
        "ipwd_A_detached": ("ipwd", a | {"terms__cls__source": "detached"}),
    }


def _config(name, method, changes, pair):
    config = load_config(f"{BASELINES}:{method},{','.join(pair)}", **changes)
    networks = pair if config.teacher.name else pair[1:]
    config.name = f"ratio_{name}_{'_'.join(networks)}"
    config.seeds, config.data.download = (0, 1, 2), True
    for side in (config, config.teacher):
        side.epochs, side.optimizer.milestones = EPOCHS, MILESTONES
    return config
