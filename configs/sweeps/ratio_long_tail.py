"""The runs of ratio_small.py on CIFAR-100 with a long tail, where the teacher is more imbalanced.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_long_tail.py --out=runs/long_tail

The first class has 100 times as many training images as the last one, and 10,847 are left of
50,000. Twice as many epochs of the teacher, which is trained on them too, and four times as many
of the students make up for this in part. The constant weight is the mean weight of ratio A here.
"""

from pathlib import Path

from ipwd_jax.api import load_module

SMALL = load_module(Path(__file__).with_name("ratio_small.py"))


def get_runs(constants="1.91"):
    """The runs of ratio_small.py, in the same order.

    Args:
        constants: the constant weights, with commas between them.
    """
    runs = SMALL.get_runs(constants)
    for run in runs:
        config = run["config"]
        config.data.long_tail = 100.0
        config.teacher.pretrained = ""
        config.teacher.epochs, config.teacher.optimizer.milestones = 32, (20, 24, 28)
        config.epochs *= 4
        config.eval_every_epochs = 4  # the test set is as large as the training set
        config.optimizer.milestones = tuple(4 * m for m in config.optimizer.milestones)
    return runs
