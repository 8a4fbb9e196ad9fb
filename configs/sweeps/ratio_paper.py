"""The methods of ratio_small.py with networks and schedule of the paper: resnet32x4 -> resnet8x4.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_paper.py --out=runs/ratio_paper
    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_paper.py:1.9 --out=runs/ratio_paper

The teacher is trained first, with the recipe of Tian et al. (2020), and every run has 240 epochs
and random crops, so this is a study for a GPU. With --minutes=9, for example, it is trained in
slices of nine minutes; each of them continues where the last one stopped. As in ratio_small.py, the
constant weight should be `weight_mean` in the `result.json` of `ipwd_A`. It is 2 in the first
command, since it is not known before, and the second command takes what follows the colon.
"""

from pathlib import Path

from ipwd_jax.api import load_module
from ipwd_jax.config import default

SMALL = load_module(Path(__file__).with_name("ratio_small.py"))
PAIR = ("resnet32x4", "resnet8x4")


def get_runs(constants="2"):
    """The runs of ratio_small.py, in the same order.

    Args:
        constants: the constant weights, with commas between them.
    """
    paper, runs = default(), SMALL.get_runs(constants, PAIR)
    for run in runs:
        config = run["config"]
        config.epochs, config.optimizer.milestones = paper.epochs, paper.optimizer.milestones
        config.data.crop_padding = paper.data.crop_padding
        config.teacher.view_cache = paper.teacher.view_cache
        config.teacher.pretrained = paper.teacher.pretrained
    return runs
