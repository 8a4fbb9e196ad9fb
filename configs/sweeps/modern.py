"""The methods of configs/recipes/ on one pair, with KD and DKD for comparison.

    python -m ipwd_jax.sweep --config=configs/sweeps/modern.py --out=runs/modern
    python -m ipwd_jax.sweep --config=configs/sweeps/modern.py:wrn_40_2,wrn_16_2 --dry_run

What follows the colon is the pair, TEACHER,STUDENT. A missing CIFAR-100 is downloaded. Three seeds
of each run train one after the other, for 240 epochs or, with MLKD, for those of its recipe.
"""

from pathlib import Path

from ipwd_jax.api import load_config, load_module

BASELINES = Path(__file__).parents[1] / "cifar_baselines.py"
SEEDS = (0, 1, 2)


def get_runs(pair="resnet32x4,resnet8x4"):
    """Every method for the pair.

    Args:
        pair: `TEACHER,STUDENT`.
    """
    return [
        {
            "config": load_config(f"{BASELINES}:{method},{pair}", data__download=True),
            "seeds": SEEDS,
        }
        for method in ("kd", "dkd", *load_module(BASELINES).MODERN_METHODS)
    ]
