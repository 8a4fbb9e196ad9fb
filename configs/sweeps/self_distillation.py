"""Self-distillation in one stage on CIFAR-100: all methods and networks of configs/cifar_self.py.

    python -m ipwd_jax.sweep --config=configs/sweeps/self_distillation.py --out=runs/self

A missing CIFAR-100 is downloaded. Three seeds of each run train one after the other.
"""

from pathlib import Path

from ipwd_jax.api import load_config, load_module

SELF = Path(__file__).parents[1] / "cifar_self.py"
SEEDS = (0, 1, 2)


def get_runs():
    """Every method for every network."""
    recipes = load_module(SELF)
    return [
        {
            "config": load_config(f"{SELF}:{method},{network}", data__download=True),
            "seeds": SEEDS,
        }
        for network in recipes.NETWORKS
        for method in recipes.METHODS
    ]
