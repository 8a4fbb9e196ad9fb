"""Where a teacher's answers come from: a frozen network."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from ml_collections import ConfigDict

from ipwd_jax import evaluate, models, parallel, precision
from ipwd_jax.checkpoint import load_network
from ipwd_jax.config import teacher_config
from ipwd_jax.data.base import Dataset, Split
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs
from ipwd_jax.models.fold import apply_folded, fold
from ipwd_jax.state import network_shapes

_MOST_STREAMED, _MOST_COMPARED = 50_000, 1_000


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that is asked and never trained.

    Attributes:
        workdir: of its run.
        network: its module.
        variables: its parameters and running statistics, on all devices.
        answer: `answer(inputs, images, batch) -> Outputs` within the compiled step.
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
    variables: Any
    answer: Callable[[Any, jax.Array, Batch], Outputs]
    inputs: Any
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
                f"the term ofd needs a teacher whose maps come out of BatchNorm, which "
                f"{type(self.network).__name__} does not say of its own; take a resnet, wrn or vgg"
            )
        params = jax.device_get(self.variables["params"])

        def leaf(path: tuple[str, ...], name: str) -> tuple[float, ...]:
            layer = params
            for module in path:
                layer = layer[module]
            return tuple(layer[name].tolist())

        paths = self.network.preact_norms()
        return tuple((leaf(path, "scale"), leaf(path, "bias")) for path in paths)


def find_workdir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Where the teacher's run is: `config.teacher.workdir`, or else beside the student's."""
    if config.teacher.workdir:
        return pathlib.Path(config.teacher.workdir)
    return workdir.parent / f"{teacher_config(config).name}_seed{config.teacher.seed}"


def load(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> Teacher:
    """Reads a trained teacher and asks it about the whole data set.

    Args:
        config: of the student's run.
        workdir: of the teacher's run.
        dataset: of both.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network.
    """
    network = models.create(config.teacher.name, len(dataset.class_names))
    template = network_shapes(network, dataset.train.images.shape[1:])
    variables, _ = load_network(workdir, config.teacher.which, template)
    predict = evaluate.make_predict(network.apply)

    def ask(split: Split, predict: Callable = predict, inputs: Any = variables) -> np.ndarray:
        data = parallel.replicate(resident(dataset, split))
        return evaluate.predict_all(predict, inputs, data, split, config.eval_batch_size)

    answer, inputs = _make_answer(config, network, variables, dataset.train.images.shape[1:])

    def as_in_the_step(inputs: Any, images: jax.Array) -> Outputs:
        with precision.of_products(config.precision):
            return precision.at_least_float32(answer(inputs, images, None))

    train, test_logits, rounding = dataset.train, ask(dataset.test), {}
    if (config.teacher.fold or config.precision != "float32") and not config.teacher.train_mode:
        keep = _evenly(dataset.test, _MOST_COMPARED)
        found = ask(_take(dataset.test, keep), evaluate.make_predict(as_in_the_step), inputs)
        rounding = compare(found, test_logits[keep])
    if train.streamed:
        train = _take(train, _evenly(train, _MOST_STREAMED))
    return Teacher(
        workdir,
        network,
        variables,
        answer,
        inputs,
        checksum(variables),
        train_logits=ask(train),
        test_logits=test_logits,
        rounding=rounding,
    )


def compare(logits: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """`Teacher.rounding` of logits (N, C) that approximate others."""
    error = np.sqrt(np.square(logits - exact).mean() / np.square(exact).mean())
    same = logits.argmax(axis=1) == exact.argmax(axis=1)
    return {"logits_error": float(error), "same_class": float(same.mean())}


def _make_answer(
    config: ConfigDict, network: nn.Module, variables: Any, image_shape: tuple[int, ...]
) -> tuple[Callable, Any]:
    """How the step asks the network, and what it is given for that."""

    def by_network(variables: Any, images: jax.Array, batch: Batch) -> Outputs:
        low, images = precision.cast(config.precision, (variables, images))
        if not config.teacher.train_mode:
            return network.apply(low, images)
        mask = jnp.repeat(batch.mask, len(images) // len(batch.mask))
        # Nothing is mutable, so the running statistics stay as they are.
        return network.apply(low, images, train=True, mask=mask)

    def by_folded(folded: Any, images: jax.Array, batch: Batch) -> Outputs:
        return apply_folded(network, *precision.cast(config.precision, (folded, images)))

    if not config.teacher.fold:
        return by_network, variables
    return by_folded, parallel.replicate(fold(network, variables, image_shape))


def _evenly(split: Split, most: int) -> np.ndarray:
    """Positions (M,) int32 of at most so many images, evenly over their order."""
    return np.linspace(0, len(split.labels) - 1, min(most, len(split.labels))).astype(np.int32)


def _take(split: Split, keep: np.ndarray) -> Split:
    """The images at the positions (M,)."""
    images = split.images.take(keep) if split.streamed else split.images[keep]
    return Split(images, split.labels[keep])


def checksum(variables: Any) -> str:
    """CRC-32 over all leaves of a pytree, in order: 8 hexadecimal digits."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    return f"{crc:08x}"
