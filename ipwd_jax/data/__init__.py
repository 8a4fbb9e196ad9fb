"""The sources of data, by name. A new source is one function and one line here.

What else it reads of `config.data` than the statistics is noted in `USED_BY`.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import arrays, cifar, folder, streaming, tfds
from ipwd_jax.data.base import TEST_FRACTION, Dataset, Split, fingerprint, from_arrays
from ipwd_jax.errors import UserError, unknown_name

__all__ = [
    "SOURCES",
    "USED_BY",
    "Dataset",
    "Split",
    "check_augmentation",
    "fingerprint",
    "from_arrays",
    "load",
]

# `NAME` or `NAME:ARGUMENT` in `config.data.name`; the functions take the config and the argument.
SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": arrays.digits,
    "cifar10": lambda config: cifar.cifar(config, "cifar10"),
    "cifar100": lambda config: cifar.cifar(config, "cifar100"),
    "tfds:NAME": tfds.prepared,
    "folder:PATH": folder.folder,
    "numpy:PATH.npz": arrays.numpy_file,
}

# Settings that only some sources read, or any that is streamed. A source refuses by itself those
# that depend on what it finds, such as `test_fraction` where there are test images.
USED_BY = {
    "dir": ("cifar10", "cifar100", "tfds"),
    "download": ("cifar10", "cifar100"),
    "train_split": ("tfds", "folder"),
    "test_split": ("tfds", "folder"),
    "test_fraction": ("folder", "numpy"),
    "image_size": ("folder", "streaming"),
    "threads": ("streaming",),
}
_UNSET = {
    "dir": "",
    "download": False,
    "train_split": "",
    "test_split": "",
    "test_fraction": TEST_FRACTION,
    "image_size": 0,
    "threads": 0,
}


def load(config: ConfigDict) -> Dataset:
    """Read the data set that `config.name` names.

    Args:
        config: `config.data` of a run.

    Raises:
        UserError: no such source, its data is missing, damaged or unfit, or a setting is of no use
            to it.
    """
    kind, _, argument = config.name.partition(":")
    found = [
        source
        for name, source in SOURCES.items()
        if name.partition(":")[0] == kind and (":" in name) == bool(argument)
    ]
    if not found:
        raise unknown_name("data set", config.name, SOURCES)
    readers = {kind, "streaming"} if config.streaming else {kind}
    for setting, used_by in USED_BY.items():
        if config[setting] != _UNSET[setting] and readers.isdisjoint(used_by):
            streams = kind in streaming.SOURCES and "streaming" in used_by
            raise UserError(
                f"config.data.{setting} is {config[setting]!r}, which data from {kind} does not "
                f"use{' without config.data.streaming' if streams else ''}; leave it out"
            )
    if config.streaming:
        return streaming.load(config)
    return found[0](config, argument) if argument else found[0](config)


def check_augmentation(dataset: Dataset, config: ConfigDict) -> None:
    """Raises `UserError` where the crops, flips or batches of a run do not fit its images.

    Args:
        dataset: what the run trains on.
        config: of the run.
    """
    images, padding = dataset.train.images, config.data.crop_padding
    _, height, width, _ = images.shape
    if isinstance(images, np.ndarray):
        if padding >= min(height, width):
            raise UserError(
                f"config.data.crop_padding is {padding}, but the images of {dataset.name} have "
                f"{height}x{width} pixels, so that some crops would show nothing of them; set it "
                f"below {min(height, width)}"
            )
        return
    streaming.check_padding(padding)
    if images.flip != config.data.flip:
        raise UserError(
            f"config.data.flip is {config.data.flip}, but the streamed images were opened with "
            f"{images.flip}; open them with the same"
        )
    steps = max(1, config.steps_per_call, config.teacher.look_ahead)
    tested = min(config.eval_batch_size, len(dataset.test.labels))
    most = max(config.batch_size * (streaming.AHEAD + steps), tested * (streaming.AHEAD + 1))
    streaming.check_memory(most, max(height, width))
