"""Our training step and all of its inputs, as the benchmarks run it.

Both frameworks start from the same `Problem`: the same weights, images, batches and views.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from ipwd_jax import checkpoint, models, parallel, state, view_cache
from ipwd_jax import config as config_lib
from ipwd_jax import precision as precision_lib
from ipwd_jax import teacher as teacher_lib
from ipwd_jax.assemble import Experiment, assemble
from ipwd_jax.data import augment
from ipwd_jax.data.base import Dataset, Split
from ipwd_jax.data.resident import resident
from ipwd_jax.teacher import Teacher
from ipwd_jax.view_cache import ViewCache

CLASSES, PADDING = 100, 4
# The losses, and the weighting, of the arms with a teacher.
METHODS = {
    "kd": ({"ce": 0.1, "kd": 0.9}, "uniform"),
    "ipwd": ({"ce": 0.1, "kd": 0.9, "cls": 1.0}, "ipwd"),
    "crd": ({"ce": 1.0, "crd": 0.8}, "uniform"),
    "reviewkd": ({"ce": 1.0, "reviewkd": 5.0}, "uniform"),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every arm of a pair starts from.

    Attributes:
        teacher: name of the teacher's network.
        student: name of the student's network.
        variables: parameters and running statistics, with the keys "teacher" and "student".
        images: (N, H, H, 3) uint8, random.
        labels: (N,) int32, random.
        mean: (3,) float32, or float64 for arms that compute in float64.
        std: like `mean`.
        index: (steps, B) int32, the images of each step.
        view: (steps, B) int32, the views of these images, as our step draws them.
        learning_rate: learning rate of SGD, rounded to float32.
        padding: padding of the random crops in pixels.
    """

    teacher: str
    student: str
    variables: Mapping[str, Any]
    images: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    index: np.ndarray
    view: np.ndarray
    learning_rate: float
    padding: int = PADDING

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch; a short last batch is left out."""
        return len(self.images) // self.index.shape[1]

    def dataset(self) -> Dataset:
        """Return the images and labels as a data set whose test split is its training split."""
        split = Split(self.images, self.labels)
        names = tuple(map(str, range(CLASSES)))
        return Dataset("noise", split, split, names, self.mean, self.std)

    def double(self) -> "Problem":
        """Return the same problem in float64."""
        mean, std, variables = jax.tree.map(
            lambda x: x.astype(np.float64), (self.mean, self.std, self.variables)
        )
        return dataclasses.replace(self, mean=mean, std=std, variables=variables)


def make_problem(
    pair: tuple[str, str], steps: int, batch: int = 64, size: int = 50_000, side: int = 32
) -> Problem:
    """Make a problem, which depends on nothing but the arguments.

    Args:
        pair: names of the teacher and of the student.
        steps: number of steps that an arm takes over all of its runs.
        batch: images per step.
        size: number of images in all.
        side: height and width of an image in pixels.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, side, side, 3), np.uint8)
    shape = (1, side, side, 3)
    variables = {
        role: jax.jit(models.create(name, CLASSES).init)(jax.random.key(seed), jnp.zeros(shape))
        for seed, (role, name) in enumerate(zip(("teacher", "student"), pair, strict=True))
    }
    variables["teacher"] = _as_if_trained(pair[0], variables["teacher"], images[:64], rng)
    key, per_epoch = jax.random.key(0), size // batch
    draw = jax.jit(augment.draw_views, static_argnums=3)
    index, view = [], []
    for epoch in range(-(-steps // per_epoch)):
        order = augment.epoch_order(state.order_key(key), epoch, size)
        views = draw(state.augment_key(key), epoch, order, augment.num_views(PADDING, True))
        for rows, into in ((order, index), (np.asarray(views), view)):
            into.append(rows[: per_epoch * batch].reshape(per_epoch, batch))
    return Problem(
        *pair,
        variables=jax.device_get(variables),
        images=images,
        labels=rng.integers(0, CLASSES, size).astype(np.int32),
        mean=np.array([0.5071, 0.4867, 0.4408], np.float32),
        std=np.array([0.2675, 0.2565, 0.2761], np.float32),
        index=np.concatenate(index)[:steps],
        view=np.concatenate(view)[:steps],
        learning_rate=float(np.float32(config_lib.cifar_learning_rate(pair[1]))),
    )


def _as_if_trained(name: str, variables: Any, images: np.ndarray, rng: Any) -> Any:
    """Return a teacher with random running statistics near the true ones and logits of deviation 4.

    With any other statistics, the feature maps of a deep network grow or vanish from block to
    block, and the answers of a teacher that is always certain or never certain test nothing.
    """
    network = models.create(name, CLASSES)
    images = (images.astype(np.float32) - 127.5) / 64
    train = jax.jit(functools.partial(network.apply, train=True, mutable=["batch_stats"]))
    updated = traverse_util.flatten_dict(jax.device_get(train(variables, images)[1]["batch_stats"]))
    # One step moves the running statistics from mean 0 and variance 1 a tenth of the way to those
    # of the batch.
    var = {k[:-1]: (x - 0.9) / 0.1 for k, x in updated.items() if k[-1] == "var"}
    stats = {}
    for path, x in updated.items():
        noise = rng.standard_normal(x.shape).astype(np.float32)
        spread = np.sqrt(var[path[:-1]]) * 0.1 * noise
        stats[path] = (
            x / 0.1 + spread if path[-1] == "mean" else var[path[:-1]] * np.exp(0.2 * noise)
        )
    variables = {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}
    logits = jax.jit(network.apply)(variables, images).logits
    classifier = variables["params"][network.head_modules[-1]]
    louder = {**classifier, "kernel": classifier["kernel"] * (4 / logits.std())}
    params = {**variables["params"], network.head_modules[-1]: louder}
    return {**variables, "params": params}


def untrained_teacher(workdir: pathlib.Path, variables: Any) -> None:
    """Write the work directory of a teacher with these variables, as if its run were finished."""
    workdir.mkdir()
    checkpoint.save_network(workdir, variables)
    (workdir / "config.json").write_text(json.dumps({"config": {}, "checksums": {}}))
    (workdir / "result.json").write_text("{}")


class OurArm:
    """Our compiled step with its state, ready to run.

    Attributes:
        problem: the problem that the arm started from.
        experiment: the experiment that the arm trains.
        now: the current state, which every step replaces.
        compiled: the step of a single seed, from `Experiment.train_step`.
        steps_per_call: number of steps that one call of `compiled` takes.
        done: number of steps taken.
    """

    def __init__(
        self,
        problem: Problem,
        precision: str = "float32",
        teacher: str = "network",
        steps_per_call: int = 1,
        method: str = "kd",
    ) -> None:
        """Set everything up; the first call of `compiled` compiles it.

        Args:
            problem: the problem to start from.
            precision: the value of `config.precision`.
            teacher: how the teacher is asked: "network", in each step; "ahead", once per call for
                all of its steps; "folded", in each step, with BatchNorm folded into the
                convolutions; "cached", before the first step. "" stands for no teacher and a loss
                of cross-entropy alone.
            steps_per_call: number of steps of one compiled call.
            method: one of `METHODS`; without a teacher, it has no effect.
        """
        self.problem, self.steps_per_call, self.done = problem, steps_per_call, 0
        self.experiment = experiment = _experiment(
            problem, _config(problem, precision, teacher, steps_per_call, method), teacher
        )
        now, ours = experiment.initial_state(seed=0), problem.variables["student"]
        now = now.replace(
            params={**now.params, "student": ours["params"]},
            batch_stats={**now.batch_stats, "student": ours["batch_stats"]},
        )
        self.now = parallel.replicate(experiment.begin(0, now))
        dataset = experiment.dataset
        self._data = parallel.replicate(resident(dataset, dataset.train))
        self._inputs = experiment.teacher.inputs if experiment.teacher else {}
        self._index, self._mask = augment.epoch_batches(
            problem.index.reshape(-1), problem.index.shape[1], parallel.device_count()
        )
        self.compiled = experiment.train_step(0)

    def next_arguments(self, seeds: int = 1) -> tuple:
        """Return the arguments of the next call after the states; all seeds get the same batch."""
        rows = slice(self.done, self.done + self.steps_per_call)
        batch = (self._index[rows],) * seeds, (self._mask[rows],) * seeds, (None,) * seeds
        return self._data, self._inputs, *batch

    def run(self, steps: int) -> tuple[float, float]:
        """Take steps; return the seconds until the device has finished, and their mean loss.

        The mean loss is meaningful only within the first epoch.
        """
        before, started = self._losses(), time.perf_counter()
        for _ in range(steps // self.steps_per_call):
            (self.now,) = self.compiled((self.now,), *self.next_arguments())
            self.done += self.steps_per_call
        jax.block_until_ready(self.now)
        seconds = time.perf_counter() - started
        return seconds, (self._losses() - before) / (steps * self.problem.index.shape[1])

    def _losses(self) -> float:
        return float(self.now.metrics["loss"].total)

    def peak_memory(self) -> int | None:
        """Return the most bytes the device has held so far, for anything; None if not counted."""
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _experiment(problem: Problem, config: ConfigDict, kind: str) -> Experiment:
    """Return the experiment that an arm trains, with a teacher that is asked in this way."""
    dataset = problem.dataset()
    teacher = None
    if kind:
        teacher = teacher_lib.from_variables(config, problem.variables["teacher"], dataset)
    if kind == "cached":
        cache = parallel.replicate(_cache(teacher, problem, config.precision))
        teacher = dataclasses.replace(teacher, answer=view_cache.answer, inputs=cache)
    experiment = assemble(config, dataset, teacher)
    # A problem's views are those of epochs without the short last batch.
    return dataclasses.replace(experiment, steps_per_epoch=problem.steps_per_epoch)


def _config(
    problem: Problem, precision: str, kind: str, steps_per_call: int, method: str
) -> ConfigDict:
    config = config_lib.default()
    config.precision, config.data.crop_padding = precision, problem.padding
    config.batch_size, config.steps_per_call = problem.index.shape[1], steps_per_call
    config.optimizer.learning_rate = problem.learning_rate
    config.model.name, config.teacher.name = problem.student, problem.teacher if kind else ""
    config.teacher.fold = kind == "folded"
    config.teacher.look_ahead = steps_per_call if kind == "ahead" else 0
    if kind:
        losses, config.weighting.name = METHODS[method]
        config.loss.update(losses)
    return config


def _cache(teacher: Teacher, problem: Problem, precision: str) -> ViewCache:
    """Return the teacher's logits for every view that the problem's steps see."""
    views = augment.num_views(problem.padding, True)
    drawn = np.unique(problem.index * views + problem.view)

    @jax.jit
    def logits(inputs: Any, stored: jax.Array, view: jax.Array) -> jax.Array:
        images = augment.apply_views(stored, view, problem.padding, True)
        images = augment.normalize(images, jnp.asarray(problem.mean), jnp.asarray(problem.std))
        with precision_lib.of_products(precision):
            return precision_lib.at_least_float32(teacher.ask(inputs, images).logits)

    each = problem.index.shape[1]
    # The last batch is filled up with views that were already asked about.
    asked = np.resize(drawn, -(-len(drawn) // each) * each).reshape(-1, each)
    answers = [
        np.asarray(logits(teacher.inputs, problem.images[rows // views], rows % views))
        for rows in asked
    ]
    row = np.full((len(problem.images), views), len(drawn), np.int32)
    row[drawn // views, drawn % views] = np.arange(len(drawn), dtype=np.int32)
    return ViewCache(np.concatenate(answers)[: len(drawn)], None, row, views)
