"""What IPWD's weights contribute, and which ratio they should have: vgg8 -> resnet8 on CIFAR-100.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_small.py --out=runs/ratio
    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_small.py:1.95,2.1 --out=runs/ratio

The networks are small enough for a CPU: a student takes 0.5 to 1.5 hours on one core. The teacher
is one of those that come with the package (`python -m ipwd_jax.teachers`). A student trains for 20
epochs instead of the paper's 240, and the learning rate falls at the same fractions of them,
rounded. Images are mirrored but not cropped, so that the teacher's answers to all 100,000 views
take minutes; with crops, they would take as long as the students. A missing CIFAR-100 is
downloaded. Two of these commands at the same time share the runs.

The seven most important methods come first, with two seeds, and the others after them: the scores
without standardisation, whose weights differ much more, WSLD, a head that does not train the
backbone, and WSLD's loss with the constant that is its mean weight. The third seed of all of them
comes last.

A weight larger than 1 strengthens distillation as a whole, so two of the methods, one of them with
IPWD's second head, multiply the loss of KD by a constant. It should be IPWD's mean weight, which is
`weight_mean` in the `result.json` of its run. The first command takes 1.95, the mean weight of
ratio A with seed 0. The second command has both of these for each of the constants that follow the
colon instead. The scores without standardisation have no bound on their ratio; if such a run
diverges, it is reported as failed, and the others are trained.
"""

from pathlib import Path

from ipwd_jax.api import load_config
from ipwd_jax.errors import UserError

BASELINES = Path(__file__).parents[1] / "cifar_baselines.py"
PAIR = ("vgg8", "resnet8")
TEACHER = "vgg8@cifar100-16ep"
SEEDS = (0, 1, 2)
A, B = ({"weighting__ratio": ratio} for ratio in "AB")
CLS = {"loss__cls": 1.0}
RAW = {"weighting__standardize": False}
# Name, method of configs/cifar_baselines.py, and the settings that differ from it.
OTHERS = [
    ("ipwd_A_raw", "ipwd", A | RAW),
    ("ipwd_B_raw", "ipwd", B | RAW),
    ("wsld", "wsld", {}),
    ("ipwd_A_detached", "ipwd", A | {"terms__cls__source": "detached"}),
    ("wsld_times0.81", "wsld", {"weighting__name": "constant", "weighting__constant": 0.81}),
]


def get_runs(constants="1.95", pair=PAIR):
    """The important methods, seed after seed, and then the others; last, all with the third seed.

    Args:
        constants: the constant weights, with commas between them.
        pair: the networks of the teacher and of the students.
    """
    return [
        {"config": _config(pair, *arm), "seeds": (seed,)}
        for seeds in (SEEDS[:2], SEEDS[2:])
        for part in (_deciding(constants), OTHERS)
        for seed in seeds
        for arm in part
    ]


def _deciding(constants):
    try:
        weights = [float(constant) for constant in constants.split(",")]
    except ValueError:
        raise UserError(f"this sweep takes numbers after the colon, found {constants!r}") from None

    def constant(weight):
        return {"weighting__constant": weight}

    return [
        ("ipwd_A", "ipwd", A),
        ("kd", "kd", {}),
        ("ce", "ce", {}),
        ("kd_cls", "kd", CLS),
        *((f"kd_times{w:g}", "kd_constant", constant(w)) for w in weights),
        *((f"kd_cls_times{w:g}", "kd_constant", CLS | constant(w)) for w in weights),
        ("ipwd_B", "ipwd", B),
    ]


def _config(pair, name, method, changes):
    config = load_config(f"{BASELINES}:{method},{','.join(pair)}", **changes)
    networks = pair if config.teacher.name else pair[1:]
    config.name = "_".join(("cifar100", name, *networks))
    config.data.download = True
    config.data.crop_padding = 0
    if config.teacher.name:
        config.teacher.view_cache = "all"
        config.teacher.pretrained = TEACHER
    config.epochs, config.optimizer.milestones = 20, (13, 15, 18)
    return config
