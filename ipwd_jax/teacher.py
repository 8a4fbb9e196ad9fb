"""Where a teacher's answers come from: a frozen network."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from ml_collections import ConfigDict

from ipwd_jax import evaluate, models, parallel, precision
from ipwd_jax import workdir as workdir_lib
from ipwd_jax.checkpoint import checksum, load_network
from ipwd_jax.config import teacher_config
from ipwd_jax.data.base import Dataset, Split
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.fold import apply_folded, fold
from ipwd_jax.state import network_shapes
from ipwd_jax.typing import Answer, PyTree

_MOST_STREAMED, _MOST_COMPARED = 50_000, 1_000


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is asked and never trained.

    Attributes:
        workdir: of its run.
        network: its module.
        variables: its parameters and running statistics, on all devices.
        ask: `ask(inputs, images, mask=None) -> Outputs` of the network, within a compiled program;
            `mask` leaves padding out where the answer depends on the batch (`train_mode`).
        answer: `answer(inputs, images, batch) -> Outputs` within the step, by `ask` or looked up.
        inputs: what `answer` reads, on all devices.
        checksum: of `variables`.
        train_logits: (N, C), of the unaugmented training set; of streamed images at most 50,000.
        test_logits: (N_test, C).
        rounding: how far what `answer` gives for test images is from float32: `logits_error`, the
            root mean square of the difference over that of the logits, and `same_class`, the share
            of images with the same first class. Empty where `answer` computes in float32.
    """

    workdir: pathlib.Path
    network: nn.Module
    variables: PyTree
    ask: Callable[..., Outputs]
    answer: Answer
    inputs: PyTree
    checksum: str
    train_logits: np.ndarray
    test_logits: np.ndarray
    rounding: Mapping[str, float]

    def class_mass(self, temperature: float = 1.0) -> np.ndarray:
        """(C,) float64, its probabilities summed over the unaugmented training set."""
        logits = self.train_logits.astype(np.float64) / temperature
        return scipy.special.softmax(logits, axis=1).sum(axis=0)

    def preact_norms(self) -> tuple:
        """(gammas, betas) of the BatchNorm that gives each `preact` after the stem.

        Raises:
            UserError: the network does not say which they are.
        """
        if not hasattr(self.network, "preact_norms"):
            raise UserError(
                f"a loss term needs a teacher whose maps come out of BatchNorm, which "
                f"{type(self.network).__name__} does not say of its own; take another teacher"
            )
        params = jax.device_get(self.variables["params"])

        def leaf(path: tuple[str, ...], name: str) -> tuple[float, ...]:
            layer = params
            for module in path:
                layer = layer[module]
            return tuple(layer[name].tolist())

        paths = self.network.preact_norms()
        return tuple((leaf(path, "scale"), leaf(path, "bias")) for path in paths)


def check_named(config: ConfigDict, may_train: bool) -> None:
    """Raises `UserError` where `config.teacher.workdir` names no finished run.

    Args:
        config: of the student's run.
        may_train: whether a teacher that is missing there is trained on purpose.
    """
    workdir = pathlib.Path(config.teacher.workdir)
    if not (config.teacher.name and config.teacher.workdir) or may_train:
        return
    if not (workdir / "result.json").exists():
        found = "an unfinished run" if (workdir / "config.json").exists() else "no run"
        raise UserError(
            f"config.teacher.workdir names {workdir}, where there is {found}. Train the teacher "
            "there on purpose with the same command and --mode=teacher, or leave the setting out "
            "to have it trained beside the student."
        )


def find_workdir(
    config: ConfigDict, workdir: pathlib.Path, data_name: str, checksums: Mapping[str, str]
) -> pathlib.Path:
    """Where the teacher's run is, or is to be.

    `config.teacher.workdir` if it is set. Otherwise beside the student: a finished run of the same
    recipe on the same data, whatever its name, or else the folder `DATA_NETWORK_CHECKSUM_seedSEED`,
    whose checksum is of data and recipe, so that teachers of different data or recipes are side by
    side.

    Args:
        config: of the student's run.
        workdir: of the student's run.
        data_name: of the data set.
        checksums: of the `data`.
    """
    if config.teacher.workdir:
        return pathlib.Path(config.teacher.workdir)
    recipe = teacher_config(config)
    identity = workdir_lib.identity(recipe, checksums)
    name = f"{data_name}_{recipe.name}_{identity}_seed{recipe.seed}".replace("/", "-")
    own = workdir.parent / name.replace(":", "-")
    if own.exists():
        return own
    beside = sorted(path.parent for path in workdir.parent.glob("*/result.json"))
    found = (run for run in beside if workdir_lib.holds(run, recipe, checksums))
    return next(found, own)


def load(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> Teacher:
    """Reads a trained teacher and asks it about the whole data set.

    Args:
        config: of the student's run.
        workdir: of the teacher's run.
        dataset: of both.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network, or the network has
            diverged.
    """
    network = _network(config, dataset)
    template = network_shapes(network, dataset.train.images.shape[1:])
    variables, _ = load_network(workdir, config.teacher.which, template)
    teacher = from_variables(config, variables, dataset, workdir)
    predict = evaluate.make_predict(network.apply)

    def logits(split: Split, predict: Callable = predict, inputs: PyTree = variables) -> np.ndarray:
        data = parallel.replicate(resident(dataset, split))
        return evaluate.predict_all(predict, inputs, data, split, config.eval_batch_size)

    def as_in_the_step(inputs: PyTree, images: jax.Array) -> Outputs:
        with precision.of_products(config.precision):
            return precision.at_least_float32(teacher.ask(inputs, images))

    train, of_test, rounding = dataset.train, logits(dataset.test), {}
    if (config.teacher.fold or config.precision != "float32") and not config.teacher.train_mode:
        keep = _evenly(dataset.test, _MOST_COMPARED)
        rounded = evaluate.make_predict(as_in_the_step)
        found = logits(_take(dataset.test, keep), rounded, teacher.inputs)
        rounding = compare(found, of_test[keep])
    if train.streamed:
        train = _take(train, _evenly(train, _MOST_STREAMED))
    return dataclasses.replace(
        teacher, train_logits=logits(train), test_logits=of_test, rounding=rounding
    )


def from_variables(
    config: ConfigDict,
    variables: PyTree,
    dataset: Dataset,
    workdir: pathlib.Path = pathlib.Path(),
) -> Teacher:
    """A teacher that a step can ask, of whose answers on the data set nothing is known yet.

    Args:
        config: of the student's run.
        variables: of the network `config.teacher.name`.
        dataset: of the run.
        workdir: of the teacher's run, beside which its cached answers are kept.
    """
    network = _network(config, dataset)
    variables = parallel.replicate(variables)
    ask, inputs = _make_ask(config, network, variables, dataset.train.images.shape[1:])

    def answer(inputs: PyTree, images: jax.Array, batch: Batch) -> Outputs:
        return ask(inputs, images, batch.mask)

    unknown = np.empty((0, len(dataset.class_names)), np.float32)
    crc = checksum(variables)
    return Teacher(workdir, network, variables, ask, answer, inputs, crc, unknown, unknown, {})


def _network(config: ConfigDict, dataset: Dataset) -> nn.Module:
    # In training mode its statistics are of the same rows as the student's.
    together = config.teacher.train_mode and config.sync_batch_norm
    axis_name = parallel.AXIS if together else None
    return models.create(config.teacher.name, len(dataset.class_names), axis_name)


def compare(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """`Teacher.rounding` of logits (N, C) that approximate others."""
    error = np.sqrt(np.square(logits - exact).mean() / np.square(exact).mean())
    same = logits.argmax(axis=1) == exact.argmax(axis=1)
    return {"logits_error": float(error), "same_class": float(same.mean())}


def _make_ask(
    config: ConfigDict, network: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> tuple[Callable[..., Outputs], PyTree]:
    """How the network is asked within a compiled program, and what it is given for that."""

    def by_network(variables: PyTree, images: jax.Array, mask: jax.Array | None = None) -> Outputs:
        low, images = precision.cast(config.precision, (variables, images))
        if not config.teacher.train_mode:
            return cast(Outputs, network.apply(low, images))
        rows = None if mask is None else jnp.repeat(mask, len(images) // len(mask))
        # Nothing is mutable, so the running statistics stay as they are.
        return cast(Outputs, network.apply(low, images, train=True, mask=rows))

    def by_folded(folded: PyTree, images: jax.Array, mask: jax.Array | None = None) -> Outputs:
        return apply_folded(network, *precision.cast(config.precision, (folded, images)))

    if not config.teacher.fold:
        return by_network, variables
    return by_folded, parallel.replicate(fold(network, variables, image_shape))


def _evenly(split: Split, most: int) -> np.ndarray:
    """Positions (M,) int32 of at most so many images, evenly over their order."""
    return np.linspace(0, len(split.labels) - 1, min(most, len(split.labels))).astype(np.int32)


def _take(split: Split, keep: np.ndarray) -> Split:
    """The images at the positions (M,)."""
    images = split.images
    taken = images[keep] if isinstance(images, np.ndarray) else images.take(keep)
    return Split(taken, split.labels[keep])
