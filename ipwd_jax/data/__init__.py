"""The sources of data, by name. A new source is one function and one line here."""

from collections.abc import Callable

from ml_collections import ConfigDict

from ipwd_jax.data import arrays, cifar, folder, streaming, tfds
from ipwd_jax.data.base import Dataset, Split, fingerprint, from_arrays
from ipwd_jax.errors import UserError, unknown_name

__all__ = ["SOURCES", "Dataset", "Split", "fingerprint", "from_arrays", "load"]

# `NAME` or `NAME:ARGUMENT` in `config.data.name`; the functions take the config and the argument.
SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": arrays.digits,
    "cifar10": lambda config: cifar.cifar(config, "cifar10"),
    "cifar100": lambda config: cifar.cifar(config, "cifar100"),
    "tfds:NAME": tfds.prepared,
    "folder:PATH": folder.folder,
    "numpy:PATH.npz": arrays.numpy_file,
}

# Settings that only some sources read.
_USED_BY = {
    "image_size": ("folder",),
    "train_split": ("tfds", "folder"),
    "test_split": ("tfds", "folder"),
    "download": ("cifar10", "cifar100"),
}


def load(config: ConfigDict) -> Dataset:
    """Read the data set that `config.name` names.

    Args:
        config: `config.data` of a run.

    Raises:
        UserError: no such source, or its data is missing, damaged or unfit.
    """
    if config.streaming:
        return streaming.load(config)
    kind, _, argument = config.name.partition(":")
    for setting, sources in _USED_BY.items():
        if config[setting] and kind not in sources:
            raise UserError(
                f"config.data.{setting} is {config[setting]!r}, which data from {kind} does not use"
            )
    for name, source in SOURCES.items():
        known, _, takes = name.partition(":")
        if kind == known and bool(argument) == bool(takes):
            return source(config, argument) if takes else source(config)
    raise unknown_name("data set", config.name, SOURCES)
