"""IPWD on your own images.

    python -m ipwd_jax.main --config=configs/own_data.py:PATH
    python -m ipwd_jax.main --config=configs/own_data.py:PATH,resnet32x4,MobileNetV2
    python -m ipwd_jax.main --config=configs/own_data.py:PATH --config.data.image_size=96

PATH is a folder with one subfolder of images per class, or with the folders `train` and `test` (or
`val`) of such subfolders; or a `.npz` file with the arrays `train_images` (N, H, W, channels) uint8
and `train_labels` (N,), and optionally `test_images` and `test_labels`. A fifth of data without a
test split is held out.

The settings are those of CIFAR-100 with fewer epochs and a cosine schedule, for images of objects
that may be mirrored; for characters, for example, add --config.data.flip=False. A teacher that was
imported from PyTorch needs its own --config.data.mean and --config.data.std.
"""

import pathlib
import re

from ipwd_jax.config import cifar_learning_rate, default
from ipwd_jax.errors import UserError


def get_config(arg: str = ""):
    """Train a teacher on the data and distil it.

    Args:
        arg: `PATH`, or `PATH,TEACHER,STUDENT`.
    """
    parts = arg.split(",")
    if len(parts) not in (1, 3) or not all(parts):
        raise UserError(
            "configs/own_data.py needs the path of the data, --config=configs/own_data.py:PATH, or "
            f"a path without commas and two networks, PATH,TEACHER,STUDENT; found {arg!r}"
        )
    path, teacher, student = parts if len(parts) == 3 else (arg, "resnet32x4", "resnet8x4")
    config = default()
    # Checkpoints cannot be in a folder whose name has these characters.
    name = re.sub(r"[\[*?]", "-", pathlib.Path(path).resolve().name.removesuffix(".npz"))
    config.name = f"{name}_ipwd_{teacher}_{student}"
    if path.endswith(".npz"):
        config.data.name = f"numpy:{path}"
    else:
        config.data.name, config.data.image_size = f"folder:{path}", 64
    config.model.name, config.teacher.name = student, teacher
    config.epochs = config.teacher.epochs = 100
    for network, optimizer in (
        (student, config.optimizer),
        (teacher, config.teacher.optimizer),
    ):
        optimizer.learning_rate = cifar_learning_rate(network)
        optimizer.schedule = "cosine"
    config.loss.update({"ce": 0.1, "kd": 0.9, "cls": 1.0})
    config.weighting.name = "ipwd"
    return config
