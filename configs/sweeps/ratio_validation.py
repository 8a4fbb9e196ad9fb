"""Some runs of ratio_small.py with 5,000 validation images, which choose the best epoch.

    python -m ipwd_jax.sweep --config=configs/sweeps/ratio_validation.py --out=runs/ratio_validation

The command must be started in the folder that holds `ipwd_jax` and `configs`.

The test set then plays no part in that choice, so that the accuracy of the best epoch on it is what
can be expected of other images. Students are trained on the other 45,000 images. Their teacher is
that of ratio_small.py, which has seen all 50,000. A run refuses a teacher that is known to be of
other data than its own; of a teacher in a file this is not known, so the teacher is named as a file
here. The choice is only between epochs of a student, which never gets the teacher's answers to the
validation images.
"""

from pathlib import Path

from ipwd_jax.api import load_module

SMALL = load_module(Path(__file__).with_name("ratio_small.py"))
TEACHER = f"ipwd_jax/teachers/{SMALL.TEACHER}.safetensors"
ARMS = ("kd", "ipwd_A", "kd_cls_times1.95", "ipwd_A_raw", "wsld", "ce")


def get_runs():
    """Six of the methods, each with two seeds, seed after seed."""
    runs = []
    for run in SMALL.get_runs():
        config = run["config"]
        arm = config.name.removeprefix("cifar100_").partition("_vgg8")[0].partition("_resnet8")[0]
        if arm in ARMS and run["seeds"] != (2,):
            config.data.validation_fraction = 0.1
            config.teacher.pretrained = TEACHER if config.teacher.name else ""
            runs.append((run["seeds"], ARMS.index(arm), run))
    return [run for *_, run in sorted(runs, key=lambda found: found[:2])]
