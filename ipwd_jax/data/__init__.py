"""The data sources, by name. A new source takes one function and one line in `SOURCES`.

If it reads settings of `config.data` that not all sources read, its name is added to their entries
in `USED_BY`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import parallel
from ipwd_jax.config import default
from ipwd_jax.data import arrays, cifar, folder, streaming, tfds
from ipwd_jax.data.base import (
    Dataset,
    Split,
    fingerprint,
    from_arrays,
    hold_out,
    long_tailed,
)
from ipwd_jax.errors import UserError, unknown_name, warn

__all__ = [
    "SOURCES",
    "USED_BY",
    "Dataset",
    "Split",
    "check_augmentation",
    "check_queues",
    "fingerprint",
    "from_arrays",
    "given",
    "load",
]

# The keys have the form `NAME` or `NAME:ARGUMENT`, as in `config.data.name`. The functions take
# `config.data` and, if there is one, the argument.
SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": arrays.digits,
    "cifar10": lambda config: cifar.cifar(config, "cifar10"),
    "cifar100": lambda config: cifar.cifar(config, "cifar100"),
    "tfds:NAME": tfds.prepared,
    "folder:PATH": folder.folder,
    "numpy:PATH.npz": arrays.numpy_file,
}

# Settings that only some sources read, or that only streamed data needs. A source itself refuses
# settings that depend on what it finds, such as `test_fraction` when there are test images.
USED_BY = {
    "dir": ("cifar10", "cifar100", "tfds"),
    "download": ("cifar10", "cifar100"),
    "train_split": ("tfds", "folder"),
    "test_split": ("tfds", "folder"),
    "test_fraction": ("folder", "numpy"),
    "image_size": ("folder", "streaming"),
    "threads": ("streaming",),
}


def load(config: ConfigDict) -> Dataset:
    """Read the data set that `config.name` names.

    Args:
        config: `config.data` of a run.

    Raises:
        UserError: there is no such source; its data is missing, damaged or unsuitable; the source
            does not use one of the settings; or `long_tail` does not suit the data.
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
    unset = default().data
    for setting, used_by in USED_BY.items():
        if config[setting] != unset[setting] and readers.isdisjoint(used_by):
            streams = kind in streaming.SOURCES and "streaming" in used_by
            raise UserError(
                f"config.data.{setting} is {config[setting]!r}, which data from {kind} does not "
                f"use{' without config.data.streaming' if streams else ''}; leave it out"
            )
    try:
        if config.streaming:
            dataset = streaming.load(config)
        else:
            dataset = found[0](config, argument) if argument else found[0](config)
    except BrokenPipeError:  # after `| head`
        raise
    except OSError as error:
        raise UserError(f"config.data.name={config.name} cannot be read: {error}") from error
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"the data source {config.name} must return a Dataset, as from_arrays makes it; "
            f"found {type(dataset).__name__}"
        )
    return _divided(dataset, config)


def given(dataset: Dataset, config: ConfigDict) -> Dataset:
    """Return a data set that takes the place of `config.name`, divided as `config` says.

    A warning names the settings of sources, which have no effect on it.

    Raises:
        UserError: `config.streaming`, `long_tail` or `validation_fraction` does not suit the data.
    """
    check_type(dataset)
    if config.streaming != dataset.train.streamed:
        kind = "streamed" if dataset.train.streamed else "in memory"
        raise UserError(
            f"config.data.streaming is {config.streaming}, but the images of the data set that was "
            f"passed are {kind}; set it to {dataset.train.streamed}"
        )
    unset, of_sources = default().data, (*USED_BY, "mean", "std")
    changed = [f"config.data.{k}" for k in of_sources if config[k] and config[k] != unset[k]]
    if changed:
        warn(
            f"{', '.join(changed)} {'have' if len(changed) > 1 else 'has'} no effect on the data "
            "set that was passed in place of config.data.name"
        )
    return _divided(dataset, config)


def check_type(dataset: Any) -> Dataset:
    """Return a data set that was passed; raises `UserError` if it is something else."""
    if not isinstance(dataset, Dataset):
        raise UserError(
            "the data set must be a Dataset, as ipwd_jax.from_arrays makes it; found "
            f"{type(dataset).__name__}"
        )
    return dataset


def _divided(dataset: Dataset, config: ConfigDict) -> Dataset:
    """Return a data set whose training split is thinned out and divided as `config.data` says.

    Raises:
        UserError: `long_tail` or `validation_fraction` does not suit the data.
    """
    if config.long_tail:
        dataset = dataclasses.replace(dataset, train=long_tailed(dataset.train, config.long_tail))
    if not config.validation_fraction:
        return dataset
    if dataset.validation is not None:
        raise UserError(
            f"config.data.validation_fraction is {config.validation_fraction}, but {dataset.name} "
            "has validation images already; leave the setting out"
        )
    train, validation = hold_out(dataset.train, config.validation_fraction, dataset.name)
    return dataclasses.replace(dataset, train=train, validation=validation)


def check_augmentation(dataset: Dataset, config: ConfigDict) -> None:
    """Raise `UserError` if the augmentation of a run does not suit its images.

    Args:
        dataset: the data set that the run trains on.
        config: the whole config of the run.
    """
    images, padding = dataset.train.images, config.data.crop_padding
    _, height, width, channels = images.shape
    if config.data.rand_augment and channels not in (1, 3):
        raise UserError(
            f"config.data.rand_augment needs grey or RGB images, but those of {dataset.name} have "
            f"{channels} channels; leave it out"
        )
    if isinstance(images, np.ndarray):
        if padding >= min(height, width):
            raise UserError(
                f"config.data.crop_padding is {padding}, but the images of {dataset.name} have "
                f"{height}x{width} pixels, so some crops would show nothing but the border; set it "
                f"below {min(height, width)}"
            )
        return
    streaming.check_padding(padding)
    if config.data.mixup or config.data.cutmix:
        raise UserError(
            "config.data.mixup and config.data.cutmix mix images with any of the training "
            "set, and streamed images are not all at hand; leave out config.data.streaming"
        )
    if images.flip != config.data.flip:
        raise UserError(
            f"config.data.flip is {config.data.flip}, but the streamed images were opened with "
            f"flip={images.flip}; open them with the same value"
        )


def check_queues(dataset: Dataset, config: ConfigDict, crops: int) -> None:
    """Raise `UserError` if the streamed batches of a run do not fit into the memory.

    Args:
        dataset: the data set that the run trains on.
        config: the whole config of the run.
        crops: number of crops of each training image in a batch.
    """
    if not dataset.train.streamed:
        return
    ahead = config.teacher.look_ahead if config.teacher.name else 0
    steps = max(1, config.steps_per_call, ahead)
    trained = config.batch_size * (streaming.AHEAD + steps) * crops * max(1, len(config.seeds))
    largest = max(len(split.labels) for split in dataset.evaluated.values())
    tested = min(config.eval_batch_size, largest) * (streaming.AHEAD + 1)
    most = -(-max(trained, tested) // parallel.process_count())
    streaming.check_memory(most, max(dataset.train.images.shape[1:3]))
