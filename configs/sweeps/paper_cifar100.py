"""The CIFAR-100 tables of the paper: its methods in configs/cifar_baselines.py, on its 13 pairs.

    python -m ipwd_jax.sweep --config=configs/sweeps/paper_cifar100.py --dry_run
    python -m ipwd_jax.sweep --config=configs/sweeps/paper_cifar100.py:kd,ipwd --out=runs/paper

What follows the colon are the methods; without it, all methods of the paper are trained. A missing
CIFAR-100 is downloaded. Each run trains for 240 epochs with each of three seeds, one after the
other; spread them over several GPUs with --index and --count, as in examples/slurm_array.sh. FSP is
left out for the pairs whose maps differ in their numbers of channels.
"""

from pathlib import Path

from ipwd_jax.api import load_module

BASELINES = Path(__file__).parents[1] / "cifar_baselines.py"
SEEDS = (0, 1, 2)
# The pairs that FSP can compare.
FSP = (
    ("wrn_40_2", "wrn_16_2"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
)


def get_runs(methods=""):
    """Every method for every pair; a method without a teacher has one run for each student.

    Args:
        methods: their names, with commas between them; empty: all.
    """
    recipes = load_module(BASELINES)
    configs = {}
    for pair in recipes.PAIRS:
        for method in methods.split(",") if methods else recipes.PAPER_METHODS:
            if method == "fsp" and pair not in FSP:
                continue
            config = recipes.get_config(f"{method},{','.join(pair)}")
            config.data.download = True
            configs[config.name] = config
    return [{"config": config, "seeds": SEEDS} for config in configs.values()]
