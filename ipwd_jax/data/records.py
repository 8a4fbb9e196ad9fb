"""Encoded images with random access, from a folder or from a prepared TFDS data set."""

import contextlib
import dataclasses
import os
import pathlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import folder, tfds
from ipwd_jax.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.core.data_sources.base import BaseDataSource

_READ_AT_ONCE = 256
_LABELS_TO_KEEP = 10_000  # fewer labels are read in a moment


@dataclasses.dataclass(frozen=True)
class Records:
    """Encoded images with random access, and their labels.

    Attributes:
        name: the name of the data in error messages.
        labels: (N,) int32.
        class_names: one per class, in the order of the labels.
        read: returns the encoded image of sample 0..N-1; many threads call it at once.
        fingerprint: a checksum of what identifies the data, in 8 hexadecimal digits. It is cheap to
            compute, because no image is read for it.
        describe: returns what error messages call a sample.
    """

    name: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]
    fingerprint: str
    describe: Callable[[int], str] = "sample {}".format


def folder_records(root: str | os.PathLike, split: str) -> Records:
    """Open the image files `ROOT/SPLIT/CLASS/*.jpg`, in the order of the source `folder:ROOT`.

    Args:
        root: the folder of the splits.
        split: a split such as "train"; "" if `root` itself holds the class folders.

    Returns:
        Records with a fingerprint of the paths below the split and of the file sizes.

    Raises:
        UserError: there is no such folder, it has no classes, or a class has no images.
    """
    top = pathlib.Path(root).expanduser()
    if not (top / split).is_dir():
        found = f"it has {folder.class_folders(top)}" if top.is_dir() else "it does not even exist"
        raise UserError(f"{top} has no folder {split!r} of class folders; {found}")
    top /= split
    names = folder.class_folders(top)
    return file_records(folder.Files(top, *folder.image_files(top, names)), names)


def file_records(found: folder.Files, class_names: Sequence[str]) -> Records:
    files = [str(path) for path in found.paths]  # path objects take several times the memory
    checksum, start = 0, len(str(found.root / "_")) - 1
    for file in files:
        identity = f"/{file[start:]}\0{os.path.getsize(file)}\n"
        checksum = zlib.crc32(os.fsencode(identity), checksum)

    def read(index: int) -> bytes:
        with open(files[index], "rb", buffering=0) as opened:
            return opened.read()

    name = found.root.resolve().name
    return Records(
        name, found.labels, tuple(class_names), read, f"{checksum:08x}", files.__getitem__
    )


def tfds_splits(config: ConfigDict, name: str) -> list[Records]:
    builder, _ = tfds.open_prepared(name, config.dir)
    splits = config.train_split or "train", tfds.choose_test_split(builder, config.test_split)
    return [tfds_records(name, config.dir, split) for split in splits]


def tfds_records(name: str, data_dir: str, split: str) -> Records:
    """Open a split of a TFDS data set that is prepared as `array_record`.

    The samples are in the order of the source `tfds:NAME`. Every record is read once for its label,
    but no image is decoded. The labels of a large split are cached in a file beside the records if
    their folder is writable.

    Args:
        name: name of the data set in TFDS, such as "imagenet2012".
        data_dir: folder in which it was prepared; empty means `$TFDS_DATA_DIR` or else the default
            folder of TFDS.
        split: a split such as "train", or a slice such as "train[:90%]".

    Returns:
        Records with a fingerprint of the name, configuration, version, split and number of samples.

    Raises:
        UserError: there is no such data set or split, or it is not prepared in this format.
    """
    from tensorflow_datasets.core.decode import SkipDecoding

    builder, (image, label) = tfds.open_prepared(name, data_dir)
    with tfds.reading(builder, split):
        skip = {image: SkipDecoding()}
        source = builder.as_data_source(split, decoders=skip)
        identity = f"{builder.info.full_name} {split} {len(source)}"
        fingerprint = f"{zlib.crc32(identity.encode()):08x}"
        kept = pathlib.Path(builder.data_path) / f"ipwd_jax_labels_{fingerprint}.npz"
        labels, order = _labels(source, label, kept)

    def read(index: int) -> bytes:
        try:
            return source[int(order[index])][image]
        except Exception as error:  # array_record raises many types
            raise UserError(f"cannot be read: {error}") from error

    return Records(
        name=f"tfds:{name} {split}",
        labels=labels[order],
        class_names=tuple(builder.info.features[label].names),
        read=read,
        fingerprint=fingerprint,
    )


def _labels(
    source: "BaseDataSource", label: str, kept: pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (N,) and the order (N,) of the source, from the file `kept` if possible."""
    if len(source) < _LABELS_TO_KEEP:
        return _read_labels(source, label)
    try:
        with kept.open("rb") as stored, np.load(stored) as found:
            return found["labels"], found["order"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        labels, order = _read_labels(source, label)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, labels=labels, order=order)
        os.replace(temporary, kept)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warnings.warn(
            f"the labels could not be cached, so the next run reads all labels again: {error}",
            stacklevel=2,
        )
    return labels, order


def _read_labels(source: "BaseDataSource", label: str) -> tuple[np.ndarray, np.ndarray]:
    labels, ids = np.empty(len(source), np.int32), []
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for row, example in zip(rows, source.__getitems__(list(rows)), strict=True):
            labels[row] = example[label]
            ids.append(example.get("id"))
    ordered = np.arange(len(ids)) if None in ids else np.argsort(np.array(ids))
    return labels, ordered
