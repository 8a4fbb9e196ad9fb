"""Images that do not fit into memory: threads of the host read, decode, crop and resize them.

The appearance of a sample depends on nothing but (seed, epoch, index). The batch that it is in, the
number of threads and the step at which a run was interrupted make no difference.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Generator

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import folder, memory, tfds
from ipwd_jax.data.base import STATISTICS, Dataset, Split, check_classes, checked_statistics
from ipwd_jax.data.decode import decode_eval, decode_train
from ipwd_jax.data.records import Records, file_records, tfds_splits
from ipwd_jax.errors import UserError

SOURCES = ("folder", "tfds")
AHEAD = 4  # batches decoded or being decoded, in addition to the one yielded last

_CROPS = 2**31  # added to the epoch for each further crop; no epoch has such a number
_ROWS_OF_A_TASK = 8


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
        self,
        index: np.ndarray,
        seed: int = 0,
        epoch: int = 0,
        train: bool = False,
        crops: int = 1,
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
            crops=crops,
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
        train, test = (file_records(files, class_names) for files in splits)
    else:
        name = config.name
        train, test = tfds_splits(config, argument)
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
    crops: int = 1,
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
        crops: random crops of each image in training; the first one is the same for any number.

    Yields:
        (B, size, size, 3) uint8, or (B, crops, size, size, 3) if there are several crops; a new
        array for each step. Closing the iterator ends the threads.

    Raises:
        UserError: a sample, which the message names, cannot be read or decoded; or the batches do
            not fit into memory.
    """
    check_memory((prefetch + 1) * index.shape[1] * crops, size)
    several = (crops,) if crops > 1 else ()
    threads, stop = threads or cpus(), threading.Event()
    decode = _decoder(records, seed, epoch, size, train, flip)

    def submit(rows: np.ndarray) -> tuple[np.ndarray, list[concurrent.futures.Future]]:
        batch = np.empty((len(rows), *several, size, size, 3), np.uint8)
        step = max(1, min(_ROWS_OF_A_TASK, len(rows) // threads))
        parts = ((rows[i : i + step], batch[i : i + step]) for i in range(0, len(rows), step))
        return batch, [pool.submit(_fill, records, decode, stop, *part) for part in parts]

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


def _decoder(
    records: Records, seed: int, epoch: int, size: int, train: bool, flip: bool
) -> Callable[[int, np.ndarray], None]:
    """Return `decode(sample, out)`, which decodes a sample, in training once for each crop."""

    def decode(sample: int, out: np.ndarray) -> None:
        encoded = records.read(sample)
        if not train:
            decode_eval(encoded, size, out)
            return
        for crop, image in enumerate(out.reshape(-1, size, size, 3)):
            key = seed, epoch + crop * _CROPS, sample
            decode_train(encoded, key, size, image, flip)

    return decode


def _fill(
    records: Records,
    decode: Callable[[int, np.ndarray], None],
    stop: threading.Event,
    rows: np.ndarray,
    out: np.ndarray,
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
