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
import pathlib
import time
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import parallel, precision, workdir
from ipwd_jax.assemble import Experiment
from ipwd_jax.data import augment
from ipwd_jax.data.base import fingerprint
from ipwd_jax.data.resident import Resident, resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs
from ipwd_jax.progress import duration
from ipwd_jax.state import augment_key
from ipwd_jax.typing import PyTree
from ipwd_jax.view_files import TableFiles, shortage

_FORMAT = 1
_LONG_SECONDS = 10.0
_WORTH = 0.9  # of the answers that a run asks for; a cache that needs more of them is not built


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
    """Look up the answers to the views of a batch, without maps."""
    if cache.row is None:
        rows = batch.index * cache.views + batch.view
    else:
        rows = cache.row[batch.index, batch.view]
    embedding = None if cache.embedding is None else cache.embedding[rows]
    # If there is no embedding, no term reads it.
    logits = cache.logits[rows]
    return Outputs(logits, embedding, (), (), classifier=cache.classifier)  # type: ignore[arg-type]


def with_cache(experiment: Experiment, cache: ViewCache) -> Experiment:
    """Return the experiment with a teacher that looks its answers up.

    If terms have a strong view, it is still asked about that in the step, because strong views are
    too many to be cached.
    """
    teacher = experiment.teacher
    assert teacher is not None
    ask = teacher.ask  # JAX keeps `look_up`, and with it what it refers to

    def look_up(inputs: PyTree, images: jax.Array, batch: Batch) -> Outputs:
        cache, of_network = inputs
        outputs = answer(cache, images, batch)
        if batch.strong_image is None:
            return outputs
        return outputs.with_strong(ask(of_network, batch.strong_image, batch.mask))

    cached = dataclasses.replace(teacher, answer=answer, inputs=cache)
    if experiment.strong_view:
        cached = dataclasses.replace(teacher, answer=look_up, inputs=(cache, teacher.inputs))
    return dataclasses.replace(experiment, teacher=cached)


def check(experiment: Experiment) -> None:
    """Raise `UserError` if `config.teacher.view_cache` asks for a cache that the run cannot use."""
    teacher = experiment.config.teacher
    required = teacher.name and teacher.view_cache in ("all", "drawn")
    if required and (reason := reason_against(experiment)):
        raise UserError(
            f"config.teacher.view_cache is {teacher.view_cache}, but {reason}; set it to auto"
        )


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


def load_or_build(
    experiment: Experiment, required: bool, seeds: Sequence[int] = ()
) -> ViewCache | None:
    """Load the cache for a run from the folder of its teacher, or build it there.

    Args:
        experiment: an experiment for which `reason_against` returns nothing, and in which
            `config.teacher.view_cache` is not "off".
        required: whether the run cannot do without the cache.
        seeds: the seeds that are not finished; by default all those of the config.

    Returns:
        The cache, on all devices. None, with a printed line, if it is not required and there is not
        enough space for it, or the run itself would ask for hardly more answers.

    Raises:
        UserError: the cache is required, but there is not enough space for it.
    """
    teacher = experiment.teacher
    assert teacher is not None
    folder = teacher.workdir / "views"
    config = experiment.config
    seeds = seeds or tuple(config.seeds) or (config.seed,)
    seeds = sorted({int(experiment.order_seed(seed)) for seed in seeds})
    files, used = _files_and_views(experiment, folder, seeds)
    index, view = (rows.astype(np.int32) for rows in np.nonzero(used))
    epochs = sum(stage.epochs for stage in experiment.stages if stage.teacher_taps)
    asked = len(seeds) * epochs * len(used)
    if not required and not parallel.from_first(files.complete) and len(index) > _WORTH * asked:
        print(
            f"The teacher is asked in the steps: a cache would need {len(index):,} answers, and "
            f"the run asks for {asked:,}. For several students of this teacher, "
            "--config.teacher.view_cache=drawn computes them once",
            flush=True,
        )
        return None
    ask = _ask_of(experiment)
    data = parallel.replicate(resident(experiment.dataset, experiment.dataset.train))
    columns = jax.eval_shape(ask, teacher.inputs, data, index[:1], view[:1]).shape[1]
    needed = len(index) * columns * 4
    lacking = parallel.from_first(lambda: shortage(files, needed, _in_memory(needed, used)))
    if lacking and not required:
        print(f"Training without a cache of the teacher's answers: {lacking}", flush=True)
        return None
    if lacking:
        raise UserError(
            f"the cache of the teacher's answers does not fit: {lacking}. Free some space, or set "
            "--config.teacher.view_cache=off"
        )

    def build() -> np.ndarray:
        batch = 500 if jax.default_backend() == "cpu" else 2048
        asker = _asker(ask, teacher.inputs, data, batch)
        _say_what_it_takes(asker, index, view, batch, asked)
        return files.build(columns, (index, view), asker, batch)

    cache = _view_cache(_load(files, build), used, len(experiment.dataset.class_names))
    return parallel.replicate(dataclasses.replace(cache, classifier=_classifier(experiment)))


def _in_memory(table: int, used: np.ndarray) -> int:
    """Return the bytes that a table and the map to its rows take on each device.

    Where devices share the memory of the host, this includes the host's own copy of drawn views.
    """
    if used.all():
        return table
    of_host = table // len(parallel.local_devices()) if jax.default_backend() == "cpu" else 0
    return table + of_host + used.size * np.dtype(np.int32).itemsize


def _load(files: TableFiles, build: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a table, which the first process builds unless it is there."""
    table: np.ndarray | None = None

    def find_or_build() -> None:
        nonlocal table
        table = files.load() if files.complete() else None
        if table is not None:
            return
        # Only one of several students builds the table.
        with workdir.locked(files.table.parent, wait=True):
            table = files.load() if files.complete() else None
            if table is None:
                files.make_room()
                table = build()

    parallel.from_first(find_or_build)
    if table is None:  # the first process has it
        table = files.load() if files.complete() else None
    if table is None:
        raise UserError(f"{files.table} cannot be read, but the first process wrote it there")
    return table


def _say_what_it_takes(
    asker: Callable, index: np.ndarray, view: np.ndarray, batch: int, asked: int
) -> None:
    """Print an estimate of the time to build a table and of that which it saves, if it is long."""
    rows = slice(0, batch)
    asker(index[rows], view[rows])  # compiles the program
    started = time.monotonic()
    asker(index[rows], view[rows])
    each = (time.monotonic() - started) / batch
    if len(index) * each > _LONG_SECONDS:
        print(
            f"Computing {len(index):,} answers of the teacher takes about "
            f"{duration(len(index) * each)}. This run, and every other on the same views, then "
            f"need not ask for {asked:,} answers, which would take about {duration(asked * each)}",
            flush=True,
        )


def _files_and_views(
    experiment: Experiment, folder: pathlib.Path, seeds: Sequence[int]
) -> tuple[TableFiles, np.ndarray]:
    """Return the files of the table for runs of some seeds, and which views it has: (N, V) bool."""
    config, dataset, teacher = experiment.config, experiment.dataset, experiment.teacher
    assert teacher is not None
    epochs = max(stage.epochs for stage in experiment.stages if stage.teacher_taps)
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
    whole = TableFiles(folder, {**identity, "views": "all"})
    if mode == "auto":
        pays = views <= _WORTH * epochs * len(seeds) or parallel.from_first(whole.complete)
        mode = "all" if pays else "drawn"
    if mode == "all":
        return whole, np.ones((size, views), bool)
    drawn = {"seeds": list(seeds), "epochs": epochs}
    files = TableFiles(folder, {**identity, "views": drawn})
    of_config = sorted({int(experiment.order_seed(seed)) for seed in config.seeds})
    of_all = TableFiles(folder, {**identity, "views": {**drawn, "seeds": of_config}})
    if len(seeds) < len(of_config) and parallel.from_first(of_all.complete):
        files, seeds = of_all, of_config  # of runs that were stopped while they finished
    return files, drawn_views(config, seeds, epochs, size)


def _ask_of(experiment: Experiment) -> Callable[..., jax.Array]:
    """Return `ask(inputs, data, index, view)`, which computes the teacher's answers to some views.

    Its result (B, columns) float32 holds the logits and then, if a term reads it, the embedding.
    """
    assert experiment.teacher is not None
    # JAX keeps `ask`, and with it what it refers to.
    config, ask_teacher = experiment.config, experiment.teacher.ask
    with_embedding = "embedding" in experiment.teacher_taps

    def ask(inputs: PyTree, data: Resident, index: jax.Array, view: jax.Array) -> jax.Array:
        images = augment.apply_views(
            data.images_at(index), view, config.data.crop_padding, config.data.flip
        )
        with precision.of_products(config.precision):
            outputs = ask_teacher(inputs, augment.normalize(images, data.mean, data.std))
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
