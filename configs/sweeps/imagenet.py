"""All methods of configs/imagenet_ipwd.py on ImageNet, for two pairs of networks.

    python -m ipwd_jax.convert import resnet50-0676ba61.pth
    python -m ipwd_jax.convert import resnet34-b627a593.pth
    python -m ipwd_jax.sweep --config=configs/sweeps/imagenet.py
    python -m ipwd_jax.sweep --config=configs/sweeps/imagenet.py:folder:/data/imagenet

The first two commands import the teachers, which are those of torchvision, version 1, into the
folders that are named below. What follows the colon in the last command is `config.data.name`.
"""

from pathlib import Path

from ipwd_jax.api import load_config, load_module

IMAGENET = Path(__file__).parents[1] / "imagenet_ipwd.py"
# Teacher and student -> the folder of the teacher.
PAIRS = {
    ("ResNet50_imagenet", "MobileNetV1"): "runs/resnet50-0676ba61",
    ("ResNet34_imagenet", "ResNet18_imagenet"): "runs/resnet34-b627a593",
}


def get_runs(data="tfds:imagenet2012"):
    """Every method for both pairs, with one seed.

    Args:
        data: `config.data.name`.
    """
    return [
        {"config": _config(method, pair, folder, data)}
        for pair, folder in PAIRS.items()
        for method in load_module(IMAGENET).LOSSES
    ]


def _config(method, pair, folder, data):
    config = load_config(f"{IMAGENET}:{method},{','.join(pair)}", data__name=data)
    config.teacher.workdir = folder if config.teacher.name else ""
    return config
