"""TensorFlow Datasets that were prepared on disk, read without TensorFlow."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import memory
from ipwd_jax.data.base import STATISTICS, Dataset, from_arrays
from ipwd_jax.errors import UserError, unknown_name

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder
    from tensorflow_datasets.core.data_sources.base import BaseDataSource

_READ_AT_ONCE = 1024
_UNLABELLED_TESTS = {"imagenet2012"}  # data sets whose test images have no labels


def open_prepared(name: str, data_dir: str) -> tuple["DatasetBuilder", tuple[str, str]]:
    """Return the TFDS builder of a classification data set that is prepared as `array_record`.

    Args:
        name: name of the data set in TFDS.
        data_dir: folder in which it was prepared; empty means `$TFDS_DATA_DIR` or else the default
            folder of TFDS.

    Returns:
        The builder, and the names of the features that hold the image and the label.

    Raises:
        UserError: there is no such data set, or it is not prepared, is in another format or does
            not have labels of classes.
    """
    import tensorflow_datasets as tfds

    root = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        builder = tfds.builder(name, data_dir=root)
        prepared_in = builder.info.splits and builder.info.file_format.value
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise unknown_name("TFDS data set", name, known) from None
    except Exception as error:  # TFDS raises many types for a missing version or config
        raise UserError(f"the TFDS data set {name!r} cannot be opened: {error}") from error
    command = f"python -m ipwd_jax.data.prepare {name}"
    if not prepared_in:
        raise UserError(
            f"{name} is not prepared in {builder.data_path}. Prepare it with: "
            f"pip install 'ipwd_jax[tfds]' && {command} {root or ''}".rstrip()
        )
    if prepared_in != "array_record":
        other = f"{builder.data_path.parents[1]}_array_record"
        raise UserError(
            f"{builder.data_path} is in the format {prepared_in}, which only TensorFlow reads. "
            f"Prepare it in another folder with `{command} {other}`, and set "
            f"--config.data.dir={other}"
        )
    keys = builder.info.supervised_keys
    if not keys or not isinstance(builder.info.features[keys[1]], tfds.features.ClassLabel):
        raise UserError(
            f"{name} is not a classification data set: its supervised keys are {keys}; choose "
            "another one"
        )
    return builder, keys


def prepared(config: ConfigDict, name: str) -> Dataset:
    """Read an image classification data set of TFDS that is prepared as `array_record`.

    Args:
        config: `dir` is the folder in which it was prepared (empty: `$TFDS_DATA_DIR` or else the
            default folder of TFDS); `train_split` and `test_split` can be slices such as
            "train[:90%]".
        name: name of the data set in TFDS, such as "mnist" or "imagenette/320px".

    Raises:
        UserError: there is no such data set or split, or it is not prepared, does not consist of
            labelled images of one size, or does not fit into memory.
    """
    builder, keys = open_prepared(name, config.dir)
    splits = config.train_split or "train", choose_test_split(builder, config.test_split)
    sources = []
    for split in splits:
        with reading(builder, split):
            sources.append(builder.as_data_source(split))
    arrays: list[np.ndarray] = []
    left = sum(map(len, sources))
    for split, source in zip(splits, sources, strict=True):
        with reading(builder, split):
            arrays += _decode(builder, source, *keys, left)
        left -= len(source)
    mean, std = statistics(name)
    return from_arrays(
        *arrays,
        name=f"tfds:{name}",
        class_names=builder.info.features[keys[1]].names,
        mean=config.mean or mean,
        std=config.std or std,
    )


def choose_test_split(builder: "DatasetBuilder", wanted: str) -> str:
    """Return the split `wanted`, or else the first of test, validation and val that has labels."""
    names = ("test", "validation", "val")[builder.name in _UNLABELLED_TESTS :]
    found = [name for name in names if name in builder.info.splits]
    if not (wanted or found):
        raise UserError(
            f"{builder.name} has no test split, but only {sorted(builder.info.splits)}; divide one "
            "of these, for example with --config.data.train_split=train[:80%] and "
            "--config.data.test_split=train[80%:]"
        )
    return wanted or found[0]


def statistics(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return the published mean and standard deviation of a data set's pixels, or empty tuples."""
    return STATISTICS.get(name.partition("/")[0].partition(":")[0], ((), ()))


@contextlib.contextmanager
def reading(builder: "DatasetBuilder", split: str) -> Iterator[None]:
    """Turn every error that occurs while a split is read into a `UserError`."""
    splits = list(builder.info.splits)
    for part in split.split("+"):
        base = part.strip().partition("[")[0]
        if base not in splits:
            raise unknown_name(f"split of {builder.name}", base, splits)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from TFDS, the record files or the image decoder
        raise UserError(f"the split {split!r} of {builder.name} cannot be read: {error}") from error


def _decode(
    builder: "DatasetBuilder", source: "BaseDataSource", image: str, label: str, left: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of a split; `left` counts its images and those read later."""
    images, labels, ids = None, np.empty(len(source), np.int32), []
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
            if images is None:
                if (found := np.asarray(example[image]).dtype) != np.uint8:
                    raise UserError(
                        f"{builder.name} has images of {found}, whose range is unknown; convert "
                        "them to uint8 and use the source numpy:PATH.npz"
                    )
                _check_memory(builder.name, left, example[image].shape)
                images = np.empty((len(source), *example[image].shape), np.uint8)
            if example[image].shape != images.shape[1:]:
                raise UserError(
                    f"{builder.name} has images of several sizes, among them {images.shape[1:]} "
                    f"and {example[image].shape}; images in memory must have one size, so decode "
                    "them during training with --config.data.streaming"
                )
            images[row], labels[row] = example[image], example[label]
            ids.append(example.get("id"))
    if images is None:
        raise UserError(f"a split of {builder.name} is empty")
    if None in ids:
        return images, labels
    # TFDS shuffles when it prepares a data set. The ids of CIFAR number its examples, so sorting by
    # them makes a run the same as with the official archive.
    order = np.argsort(np.array(ids))
    return images[order], labels[order]


def _check_memory(name: str, count: int, shape: tuple[int, ...]) -> None:
    memory.check(
        f"the {count} images of tfds:{name}",
        2 * count * math.prod(shape),  # sorting copies them
        "decode them during training with --config.data.streaming, --config.data.image_size=224 "
        "(for example) and --config.data.crop_padding=0",
    )
