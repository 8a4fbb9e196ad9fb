"""TensorFlow Datasets that are prepared on disk, read without TensorFlow.

    python -m ipwd_jax.data.tfds NAME [DIR]

prepares one, which does need TensorFlow: pip install 'ipwd_jax[tfds]'.
"""

import os
import pathlib
import re
import sys

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data.base import STATISTICS, Dataset, from_arrays
from ipwd_jax.errors import UserError, unknown_name

_READ_AT_ONCE = 1024


def prepared(config: ConfigDict, name: str) -> Dataset:
    """Any image classification set of TFDS, prepared in the `array_record` format.

    Args:
        config: `dir` is where it was prepared (empty: TFDS's default, or `$TFDS_DATA_DIR`);
            `train_split` and `test_split` may be slices such as "train[:90%]".
        name: of TFDS, as "mnist" or "imagenette/320px".

    Raises:
        UserError: no such set or split, not prepared, or not of labelled images of one size.
    """
    import tensorflow_datasets as tfds

    root = config.dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.registered.DatasetNotFoundError:
        raise unknown_name(
            "TFDS data set", name, tfds.list_builders(with_community_datasets=False)
        ) from None
    command = f"python -m ipwd_jax.data.tfds {name}" + (f" {root}" if root else "")
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared in {builder.data_path}. Prepare it with: "
            f"pip install 'ipwd_jax[tfds]' && {command}"
        )
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"{builder.data_path} is in the format {builder.info.file_format.value}, which only "
            f"TensorFlow reads; prepare it again in another folder: {command}"
        )
    keys = builder.info.supervised_keys
    if not keys or not isinstance(builder.info.features[keys[1]], tfds.features.ClassLabel):
        raise UserError(f"{name} is not a classification set: its supervised keys are {keys}")
    splits = list(builder.info.splits)
    test = config.test_split or ("test" if "test" in splits else "validation")
    base = name.partition("/")[0].partition(":")[0]
    mean, std = STATISTICS.get(base, ((), ()))
    return from_arrays(
        *_read(builder, config.train_split or "train", *keys),
        *_read(builder, test, *keys),
        name=f"tfds:{name}",
        class_names=builder.info.features[keys[1]].names,
        mean=config.mean or mean,
        std=config.std or std,
    )


def _read(builder, split: str, image: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    splits = list(builder.info.splits)
    for part in split.split("+"):
        base = re.split(r"[\[]", part.strip())[0]
        if base not in splits:
            raise unknown_name(f"split of {builder.name}", base, splits)
    try:
        source = builder.as_data_source(split)
    except ValueError as error:
        raise UserError(f"the split {split!r} of {builder.name} cannot be read: {error}") from error
    images, labels, ids = None, np.empty(len(source), np.int32), []
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
            if images is None:
                images = np.empty((len(source), *example[image].shape), np.uint8)
            if example[image].shape != images.shape[1:]:
                raise UserError(
                    f"{builder.name} has images of several sizes, {images.shape[1:]} and "
                    f"{example[image].shape} among them; only one size can be held in memory"
                )
            images[row], labels[row] = example[image], example[label]
            ids.append(example.get("id"))
    if images is None:
        raise UserError(f"the split {split!r} of {builder.name} is empty")
    if None in ids:
        return images, labels
    # TFDS shuffles when it prepares. The ids of CIFAR count its examples: in their order a run is
    # the same as from the official archive.
    order = np.argsort(np.array(ids))
    return images[order], labels[order]


def prepare(name: str, root: str | None = None) -> pathlib.Path:
    """Download and write a TFDS data set in the format that `prepared` reads.

    Args:
        name: of TFDS.
        root: where; None: TFDS's default, or `$TFDS_DATA_DIR`.

    Returns:
        The folder of the data set.

    Raises:
        UserError: no TensorFlow, or no such data set.
    """
    import tensorflow_datasets as tfds

    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise UserError(
            "preparing a data set needs TensorFlow: pip install 'ipwd_jax[tfds]'"
        ) from None
    root = root or os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        raise unknown_name(
            "TFDS data set", name, tfds.list_builders(with_community_datasets=False)
        ) from None
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        print(prepare(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
