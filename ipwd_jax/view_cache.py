"""The teacher's answers to the views of the training images, each computed only once.

With a border of p pixels, random crops and flips give (2 p + 1)^2 * 2 views of an image. For the
usual 4 pixels on CIFAR, these are 162 views, fewer than the epochs of a run. Which view of a sample
is used in which epoch is known before the run starts, and so are all questions to a frozen teacher.
It can therefore be asked in large batches, and its answers can be kept in a file beside its
checkpoint and shared by all students, seeds and terms that read nothing but its logits or its
embedding. The answers are those that it would give in the step, up to rounding: for batches of
another shape, a compiled program can add up numbers in another order.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import parallel, precision, workdir, writers
from ipwd_jax.assemble import Experiment
from ipwd_jax.data import augment
from ipwd_jax.data.base import fingerprint
from ipwd_jax.data.resident import Resident, resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs
from ipwd_jax.progress import Progress, duration
from ipwd_jax.state import augment_key
from ipwd_jax.typing import PyTree

_FORMAT = 1
_FLUSH_SECONDS = 60.0
_DRAWN_TABLES = 3  # tables of drawn views that are kept beside a teacher


@flax.struct.dataclass
class ViewCache:
    """The teacher's answers, one row for each view of an image.

    Attributes:
        logits: (M, C) float32.
        embedding: (M, D) float32, or None if nothing reads it.
        row: (N, V) int32, the row of each view of each image. Views that the teacher was not asked
            about share the last row, which is NaN and so ends a run that reads it. None if there
            are rows for all views, in the order of the images and their views.
        views: V, the number of views of an image.
        classifier: the teacher's `Outputs.classifier`, or None if nothing reads it.
    """

    logits: jax.Array
    embedding: jax.Array | None
    row: jax.Array | None
    views: int = flax.struct.field(pytree_node=False)
    classifier: tuple[jax.Array, jax.Array] | None = None


def answer(cache: ViewCache, images: jax.Array, batch: Batch) -> Outputs:
    """Look up the answers to the views of a batch, without maps; it replaces `Teacher.answer`."""
    if cache.row is None:
        rows = batch.index * cache.views + batch.view
    else:
        rows = cache.row[batch.index, batch.view]
    embedding = None if cache.embedding is None else cache.embedding[rows]
    # If there is no embedding, no term reads it.
    logits = cache.logits[rows]
    return Outputs(logits, embedding, (), (), classifier=cache.classifier)  # type: ignore[arg-type]


def reason_against(experiment: Experiment) -> str:
    """Return the reason why a run cannot use the cache; empty if it can."""
    taps = experiment.teacher_taps
    if not taps:
        return "no term reads the teacher"
    if maps := taps & {"features", "preact", "pre_pool"}:
        return f"a term reads the teacher's maps ({', '.join(sorted(maps))})"
    if experiment.rotated:
        return "a term rotates the images"
    if experiment.config.teacher.train_mode:
        return "with config.teacher.train_mode, an answer depends on the batch"
    data = experiment.config.data
    if data.rand_augment or data.mixup or data.cutmix:
        return "images that are mixed or distorted have more views than can be stored"
    if experiment.dataset.train.streamed:
        return "streamed images have more views than a run draws"
    return ""


def drawn_views(config: ConfigDict, seeds: Sequence[int], epochs: int, size: int) -> np.ndarray:
    """Return which views of each image are drawn by runs of these seeds and epochs: (N, V) bool."""
    views = augment.num_views(config.data.crop_padding, config.data.flip)
    index = jnp.arange(size, dtype=jnp.int32)
    draw = jax.jit(augment.draw_views, static_argnums=3)
    used = np.zeros((size, views), bool)
    for seed in seeds:
        key = augment_key(jax.random.key(seed))
        for epoch in range(epochs):
            used[np.arange(size), np.asarray(draw(key, epoch, index, views))] = True
    return used


def load_or_build(experiment: Experiment, required: bool) -> ViewCache | None:
    """Load the cache for a run from the folder of its teacher, or build it there.

    Args:
        experiment: an experiment for which `reason_against` returns nothing, and in which
            `config.teacher.view_cache` is not "off".
        required: whether the run cannot do without the cache.

    Returns:
        The cache, on all devices. None, with a printed line, if there is not enough space for it
        and it is not required.

    Raises:
        UserError: the cache is required, but there is not enough space for it.
    """
    teacher = experiment.teacher
    assert teacher is not None
    folder = teacher.workdir / "views"
    files, used = _files_and_views(experiment, folder)
    index, view = (rows.astype(np.int32) for rows in np.nonzero(used))
    ask = _ask_of(experiment)
    data = parallel.replicate(resident(experiment.dataset, experiment.dataset.train))
    columns = jax.eval_shape(ask, teacher.inputs, data, index[:1], view[:1]).shape[1]
    needed = len(index) * columns * 4
    if shortage := parallel.from_first(
        lambda: _shortage(folder, needed, on_disk=not files.complete())
    ):
        if not required:
            print(f"Training without a cache of the teacher's answers: {shortage}", flush=True)
            return None
        raise UserError(
            f"the cache of the teacher's answers does not fit: {shortage}. Free some space, or set "
            "--config.teacher.view_cache=off"
        )
    table: np.ndarray | None = None

    def find_or_build() -> None:
        nonlocal table
        table = files.load() if files.complete() else None
        if table is not None:
            return
        batch = 500 if jax.default_backend() == "cpu" else 2048
        with workdir.locked(folder, wait=True):  # only one of several students builds the table
            table = files.load() if files.complete() else None
            if table is None:
                _remove_old_tables(folder)
                asker = _asker(ask, teacher.inputs, data, batch)
                table = files.build(columns, (index, view), asker, batch)

    parallel.from_first(find_or_build)
    if table is None:  # the first process has it
        table = files.load() if files.complete() else None
        if table is None:
            raise UserError(f"{files.table} cannot be read, but the first process wrote it there")
    cache = _view_cache(table, used, len(experiment.dataset.class_names))
    return parallel.replicate(dataclasses.replace(cache, classifier=_classifier(experiment)))


def _files_and_views(experiment: Experiment, folder: pathlib.Path) -> tuple["_Files", np.ndarray]:
    """Return the files of the table for a run, and which views it has: (N, V) bool."""
    config, dataset, teacher = experiment.config, experiment.dataset, experiment.teacher
    assert teacher is not None
    epochs = max(stage.epochs for stage in experiment.stages)
    seeds = config.seeds or (config.seed,)
    seeds = seeds[:1] if config.share_order else seeds
    size = len(dataset.train.labels)
    views = augment.num_views(config.data.crop_padding, config.data.flip)
    identity = {
        "format": _FORMAT,
        "teacher": teacher.checksum,
        "data": fingerprint(dataset),
        "precision": config.precision,
        "fold": config.teacher.fold,
        "platform": jax.default_backend(),
        "crop_padding": config.data.crop_padding,
        "flip": config.data.flip,
        "mean": np.asarray(dataset.mean).tolist(),
        "std": np.asarray(dataset.std).tolist(),
        "embedding": "embedding" in experiment.teacher_taps,
    }
    mode = config.teacher.view_cache
    whole = _Files(folder, {**identity, "views": "all"})
    if mode == "auto":
        fits = views <= epochs * len(seeds) or parallel.from_first(whole.complete)
        mode = "all" if fits else "drawn"
    if mode == "all":
        return whole, np.ones((size, views), bool)
    drawn = {"seeds": list(seeds), "epochs": epochs}
    return _Files(folder, {**identity, "views": drawn}), drawn_views(config, seeds, epochs, size)


def _ask_of(experiment: Experiment) -> Callable[..., jax.Array]:
    """Return `ask(inputs, data, index, view)`, which computes the teacher's answers to some views.

    Its result (B, columns) float32 holds the logits and then, if a term reads it, the embedding.
    """
    config, teacher = experiment.config, experiment.teacher
    assert teacher is not None

    def ask(inputs: PyTree, data: Resident, index: jax.Array, view: jax.Array) -> jax.Array:
        images = augment.apply_views(
            data.images_at(index), view, config.data.crop_padding, config.data.flip
        )
        with precision.of_products(config.precision):
            outputs = teacher.ask(inputs, augment.normalize(images, data.mean, data.std))
        with_embedding = "embedding" in experiment.teacher_taps
        columns = [outputs.logits, *([outputs.embedding] if with_embedding else [])]
        return jnp.concatenate(precision.at_least_float32(columns), axis=1)

    return ask


def _view_cache(table: np.ndarray, used: np.ndarray, classes: int) -> ViewCache:
    """Return the cache for a table whose rows are the used views, in order.

    All other views share one more row at the end, which is NaN.
    """
    row = None
    if not used.all():
        row = np.full(used.shape, len(table), np.int32)
        row[used] = np.arange(len(table), dtype=np.int32)
        table = np.concatenate([table, np.full((1, table.shape[1]), np.nan, np.float32)])
    embedding = np.asarray(table[:, classes:]) if table.shape[1] > classes else None
    # The NumPy arrays become JAX arrays when they are put on the devices.
    return ViewCache(np.asarray(table[:, :classes]), embedding, row, used.shape[1])  # type: ignore[arg-type]


def _classifier(experiment: Experiment) -> tuple[jax.Array, jax.Array] | None:
    """Return the teacher's classifier as the step sees it, or None if no term reads it."""
    teacher = experiment.teacher
    assert teacher is not None
    if "classifier" not in experiment.teacher_taps:
        return None
    image = jnp.zeros((1, *experiment.dataset.train.images.shape[1:]))
    ask = jax.jit(lambda inputs: teacher.ask(inputs, image).classifier)
    return precision.at_least_float32(ask(teacher.inputs))


def _asker(ask: Callable, inputs: PyTree, data: Resident, batch: int) -> Callable:
    """Return `asker(index, view) -> (rows, columns)` for up to `batch` rows.

    The rows are distributed over the devices of this process.
    """
    devices = len(parallel.local_devices())
    each = -(-batch // devices)
    compiled = parallel.compile_views(ask)

    def asker(index: np.ndarray, view: np.ndarray) -> np.ndarray:
        padded = [np.zeros(devices * each, np.int32) for _ in range(2)]
        for rows, given in zip(padded, (index, view), strict=True):
            rows[: len(given)] = given
        answers = compiled(inputs, data, *(rows.reshape(devices, each) for rows in padded))
        return np.asarray(answers).reshape(devices * each, -1)[: len(index)]

    return asker


def _shortage(folder: pathlib.Path, needed: int, on_disk: bool) -> str:
    """Return a description of what is lacking for `needed` bytes; empty if they fit."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if on_disk and needed > 0.9 * free:
        return (
            f"it needs {_mib(needed)}, but can use at most 90 % of the {_mib(free)} that are free "
            f"in {folder}"
        )
    statistics = parallel.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics["bytes_in_use"]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.6 * free:
        return (
            f"it needs {_mib(needed)}, but can use at most 60 % of the {_mib(free)} that are free "
            "on the device"
        )
    return ""


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _remove_old_tables(folder: pathlib.Path) -> None:
    """Remove the least recently used tables of drawn views, to make room for one more.

    A run that needs one of them again builds it again.
    """
    notes = sorted(folder.glob("[!.]*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    drawn = [path for path in notes if json.loads(path.read_text())["identity"]["views"] != "all"]
    for note in drawn[_DRAWN_TABLES - 1 :]:
        table = note.with_suffix(".npy")
        if table.exists():
            print(
                f"Removing {table} ({_mib(table.stat().st_size)}), which can be built again",
                flush=True,
            )
        note.unlink()
        table.unlink(missing_ok=True)


class _Files:
    """A table on disk: the answers in one file, and beside it a note that says what they are."""

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any]):
        self.identity = json.loads(json.dumps(identity))
        name = f"{zlib.crc32(json.dumps(self.identity, sort_keys=True).encode()):08x}"
        self.table, self.note = folder / f"{name}.npy", folder / f"{name}.json"
        self._unfinished = folder / f".{name}.npy", folder / f".{name}.json"

    def _read(self, note: pathlib.Path) -> dict[str, Any]:
        """Return the content of a note; empty if it is missing, damaged or of another table."""
        try:
            said = json.loads(note.read_text())
            return said if said["identity"] == self.identity else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def complete(self) -> bool:
        """Return whether the table is complete, judged by its note and its size."""
        said = self._read(self.note)
        return bool(said) and self.table.exists() and self.table.stat().st_size == said["bytes"]

    def load(self) -> np.ndarray | None:
        """Return the memory-mapped table; None, with a warning, if its checksum is wrong."""
        table = np.load(self.table, mmap_mode="r")
        if _checksum(table) == self._read(self.note)["checksum"]:
            print(f"Reading the teacher's answers from {self.table}", flush=True)
            self.note.touch()  # makes it the most recently used
            return table
        print(f"warning: {self.table} is damaged and will be built again", flush=True)
        return None

    def build(
        self, columns: int, pairs: tuple[np.ndarray, np.ndarray], asker: Callable, batch: int
    ) -> np.ndarray:
        """Ask about every pair of image and view, resuming where an earlier attempt was stopped."""
        index, view = pairs
        table_path, note_path = self._unfinished
        done = self._read(note_path).get("done", 0)
        shape = (len(index), columns)
        if done and table_path.exists():
            table = np.lib.format.open_memmap(table_path, mode="r+")
        else:
            done = 0
            table = np.lib.format.open_memmap(table_path, "w+", np.float32, shape)
        progress = Progress(len(index), unit="view")
        started, flushed = time.monotonic(), 0.0
        while done < len(index):
            rows = slice(done, min(done + batch, len(index)))
            table[rows] = asker(index[rows], view[rows])
            done = rows.stop
            seconds = time.monotonic() - started
            if seconds - flushed > _FLUSH_SECONDS:
                table.flush()
                writers.write_json(note_path, {"identity": self.identity, "done": done})
                flushed = seconds
            passing = f"teacher's answers: {done:,} of {len(index):,} views"
            progress.count(done, "teacher's answers", passing)
        progress.close()
        took = duration(time.monotonic() - started)
        print(f"Teacher's answers to {len(index):,} views computed in {took}", flush=True)
        table.flush()
        note = {
            "identity": self.identity,
            "bytes": table_path.stat().st_size,
            "checksum": _checksum(table),
            "seconds": time.monotonic() - started,
        }
        self.note.unlink(missing_ok=True)
        os.replace(table_path, self.table)
        writers.write_json(self.note, note)
        note_path.unlink(missing_ok=True)
        return np.load(self.table, mmap_mode="r")


def _checksum(table: np.ndarray) -> str:
    crc = 0
    for first in range(0, len(table), 1 << 16):
        rows = np.ascontiguousarray(table[first : first + (1 << 16)])
        # An array is a buffer, but its type declares this only from Python 3.12 on.
        crc = zlib.crc32(rows, crc)  # type: ignore[arg-type]
    return f"{crc:08x}"
