"""Images that do not fit into memory: threads of the host read, decode, crop and resize them.

The appearance of a sample depends on nothing but (seed, epoch, index). The batch that it is in, the
number of threads and the step at which a run was interrupted make no difference.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import folder, memory, tfds
from ipwd_jax.data.base import (
    STATISTICS,
    Dataset,
    Split,
    check_classes,
    checked_statistics,
)
from ipwd_jax.data.decode import decode_eval, decode_train, decoder_name
from ipwd_jax.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.core.data_sources.base import BaseDataSource

__all__ = [
    "Records",
    "StreamedImages",
    "batches",
    "decode_eval",
    "decode_train",
    "decoder_name",
    "folder_records",
    "load",
    "tfds_records",
]

SOURCES = ("folder", "tfds")
AHEAD = 4  # batches decoded or being decoded, in addition to the one yielded last

_READ_AT_ONCE = 256
_ROWS_OF_A_TASK = 8
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


@dataclasses.dataclass(frozen=True)
class StreamedImages:
    """Images of a split that are decoded when they are needed; implements `base.Streamed`.

    Attributes:
        records: the encoded images.
        size: height and width after decoding.
        threads: number of decoding threads; 0 means one for each CPU that this process can use.
        flip: whether training mirrors half of the images.
    """

    records: Records
    size: int
    threads: int = 0
    flip: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, channels)."""
        return len(self.records.labels), self.size, self.size, 3

    @property
    def fingerprint(self) -> str:
        """A checksum of the records and the size; the decoder makes no difference."""
        return f"{self.records.fingerprint} {self.size}"

    def batches(
        self, index: np.ndarray, seed: int = 0, epoch: int = 0, train: bool = False
    ) -> Generator[np.ndarray]:
        """See `batches`."""
        return batches(
            self.records,
            index,
            seed=seed,
            epoch=epoch,
            size=self.size,
            train=train,
            threads=self.threads,
            flip=self.flip,
        )

    def take(self, index: np.ndarray) -> "StreamedImages":
        """Return only the images at the positions `index` (M,), in that order."""
        read, describe = self.records.read, self.records.describe
        records = dataclasses.replace(
            self.records,
            labels=self.records.labels[index],
            read=lambda i: read(int(index[i])),
            describe=lambda i: describe(int(index[i])),
        )
        return dataclasses.replace(self, records=records)


def load(config: ConfigDict) -> Dataset:
    """Open `folder:PATH` or `tfds:NAME` without decoding an image.

    The splits, their order and the held-out images are the same as for a source in memory.

    Args:
        config: `config.data` of a run; `image_size` is required.

    Raises:
        UserError: the source cannot be streamed, there is no image size, `crop_padding` is not 0,
            or the data is missing or unsuitable.
    """
    kind, _, argument = config.name.partition(":")
    if kind not in SOURCES or not argument:
        raise UserError(
            f"config.data.streaming works for folder:PATH and tfds:NAME only, found {config.name!r}"
        )
    if not config.image_size:
        raise UserError("config.data.streaming needs config.data.image_size, for example 224")
    check_padding(config.crop_padding)
    mean, std = STATISTICS["imagenet2012"]
    if kind == "folder":
        name, class_names, *splits = folder.find(config, argument)
        train, test = (_file_records(files, class_names) for files in splits)
    else:
        name = config.name.rpartition("/")[2]
        train, test = _tfds_splits(config, argument)
        check_classes(name, len(train.class_names), train.labels, test.labels)
        known = tfds.statistics(argument)
        mean, std = known if len(known[0]) == 3 else (mean, std)
    statistics = checked_statistics(name, 3, config.mean or mean, config.std or std)

    def split(records: Records) -> Split:
        images = StreamedImages(records, config.image_size, config.threads, config.flip)
        return Split(images, records.labels)

    return Dataset(name, split(train), split(test), train.class_names, *statistics)


def check_padding(padding: int) -> None:
    """Raise `UserError` if streamed images are to be padded before they are cropped."""
    if padding:
        raise UserError(
            f"config.data.crop_padding is {padding}, but streamed images get random resized crops "
            "without padding; set --config.data.crop_padding=0"
        )


def check_memory(images: int, size: int) -> None:
    """Raise `UserError` if so many decoded images do not fit into memory at once."""
    memory.check(
        f"batches that hold {images} decoded images of {size}x{size} pixels",
        images * size * size * 3,
        "choose a smaller --config.data.image_size, --config.batch_size or "
        "--config.eval_batch_size",
    )


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
    return _file_records(folder.Files(top, *folder.image_files(top, names)), names)


def _file_records(found: folder.Files, class_names: Sequence[str]) -> Records:
    files = [str(path) for path in found.paths]  # path objects take several times the memory
    checksum, start = 0, folder.below(found.root)
    for file in files:
        identity = f"/{file[start:]}\0{os.path.getsize(file)}\n"
        checksum = zlib.crc32(identity.encode(), checksum)

    def read(index: int) -> bytes:
        with open(files[index], "rb", buffering=0) as opened:
            return opened.read()

    name = found.root.resolve().name
    return Records(
        name, found.labels, tuple(class_names), read, f"{checksum:08x}", files.__getitem__
    )


def _tfds_splits(config: ConfigDict, name: str) -> list[Records]:
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
    return Records(
        name=f"tfds:{name} {split}",
        labels=labels[order],
        class_names=tuple(builder.info.features[label].names),
        read=lambda index: source[int(order[index])][image],
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


def batches(
    records: Records,
    index: np.ndarray,
    *,
    seed: int,
    epoch: int,
    size: int,
    train: bool,
    threads: int = 0,
    prefetch: int = AHEAD,
    flip: bool = True,
) -> Generator[np.ndarray]:
    """Decode the batches of an epoch with threads, several batches ahead.

    Args:
        records: the encoded images.
        index: (steps, B) int32, the samples of each step; `index[n:]` resumes at step n.
        seed: seed of the run, used in training.
        epoch: number of the epoch from 0, used in training.
        size: height and width of the decoded images.
        train: whether to use `decode_train` rather than `decode_eval`.
        threads: number of decoding threads; 0 means one for each CPU that this process can use.
        prefetch: batches decoded or being decoded, in addition to the one yielded last.
        flip: as in `decode_train`.

    Yields:
        (B, size, size, 3) uint8, a new array for each step. Closing the iterator ends the threads.

    Raises:
        UserError: a sample, which the message names, cannot be read or decoded; or the batches do
            not fit into memory.
    """
    check_memory((prefetch + 1) * index.shape[1], size)
    threads = threads or cpus()
    stop = threading.Event()

    def decode(sample: int, image: np.ndarray) -> None:
        encoded = records.read(sample)
        if train:
            decode_train(encoded, (seed, epoch, sample), size, image, flip)
        else:
            decode_eval(encoded, size, image)

    def submit(rows: np.ndarray) -> tuple[np.ndarray, list[concurrent.futures.Future]]:
        batch = np.empty((len(rows), size, size, 3), np.uint8)
        part = max(1, min(_ROWS_OF_A_TASK, len(rows) // threads))
        parts = range(0, len(rows), part)
        return batch, [
            pool.submit(_fill, records, rows[i : i + part], batch[i : i + part], decode, stop)
            for i in parts
        ]

    pool = concurrent.futures.ThreadPoolExecutor(threads, "decode")
    pending: collections.deque = collections.deque()
    try:
        for rows in itertools.chain(index, [None] * (prefetch + 1)):
            if rows is not None:
                pending.append(submit(rows))
            if len(pending) > prefetch or (rows is None and pending):
                batch, tasks = pending.popleft()
                for task in tasks:
                    task.result()
                yield batch
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _fill(
    records: Records,
    rows: np.ndarray,
    out: np.ndarray,
    decode: Callable[[int, np.ndarray], None],
    stop: threading.Event,
) -> None:
    """Decode the samples `rows` into `out`; return early once `stop` is set."""
    for sample, image in zip(rows.tolist(), out, strict=True):
        if stop.is_set():
            return
        try:
            decode(sample, image)
        except (UserError, OSError) as error:
            raise UserError(f"{records.name}: {records.describe(sample)} {error}") from error


def cpus() -> int:
    """Return the number of CPUs that this process can use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the CPUs that a scheduler grants
    return len(affinity(0)) if affinity else os.cpu_count() or 1
