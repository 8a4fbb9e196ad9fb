"""Some runs of ratio_small.py with 5,000 validation images, which choose the best epoch.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_validation.py --out=runs/ratio_validation

The test set then plays no part in that choice, so that the accuracy of the best epoch on it is what
can be expected of other images. Teacher and students are trained on the other 45,000 images.
"""

from pathlib import Path

from ipwd_jax.api import load_module

SMALL = load_module(Path(__file__).with_name("ratio_small.py"))
ARMS = ("kd", "kd_cls_times1.95", "ipwd_A", "ipwd_A_raw", "wsld")


def get_runs():
    """The arms that decide, each with two seeds, seed after seed."""
    names = [f"cifar100_{arm}_{'_'.join(SMALL.PAIR)}" for arm in ARMS]
    runs = [run for run in SMALL.get_runs() if run["config"].name in names]
    for run in runs:
        config = run["config"]
        config.data.validation_fraction = 0.1
        config.teacher.pretrained = ""
        config.teacher.epochs, config.teacher.optimizer.milestones = 16, (10, 12, 14)
    return sorted((run for run in runs if run["seeds"] != (2,)), key=lambda run: run["seeds"])
