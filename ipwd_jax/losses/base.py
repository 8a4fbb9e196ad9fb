"""What a loss term is, the values that it sees, and what several terms need.

A term is a small `flax.linen` module. Its fields are its hyper-parameters, its call takes
`(student: Outputs, teacher: Outputs | None, batch: Batch)` and returns the loss of every sample,
shape (B,), or a scalar when samples are compared with each other. Trainable parts, running
statistics and memories are ordinary linen variables of the collections `params`, `batch_stats`
and `memory`; the train step carries them. What a term asks of the rest are its class attributes.

A term that has one of the fields in `RUN_FIELDS` gets it from the run. It sees the rows of one
device: whoever compares rows calls `gather_rows` first, and leaves out those that only pad.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, overload

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax.models.base import Outputs

if TYPE_CHECKING:
    from ipwd_jax.data.base import Dataset
    from ipwd_jax.teacher import Teacher

RUN_FIELDS = {
    "axis_name": "mapped axis over which the global batch is spread; None: one device",
    "train_size": "number of training samples",
    "epochs": "epochs of the stage",
    "class_prior": "(C,) the teacher's mean probabilities over the training set",
    "preact_norms": "gammas and betas of the BatchNorm behind each of the teacher's `preact`",
}


class Term(nn.Module):
    """A loss term; the attributes are what it asks of the train step.

    Attributes:
        paper: where the loss is from: author and year, a colon, a short title.
        teacher_taps: which of the teacher's `Outputs` are used, by name of the field; none: the
            term needs no teacher.
        per_sample: returns (B,), which a weighting may multiply. False: compares samples.
        heads: extra heads of the student whose logits are used: "backbone" if the gradient
            reaches the backbone, "detached" if not, "network" for a separate network.
        rotations: sees every image in four rotations: 4 B rows, image by image.
        first_stage_params: parts of `params` that only a first stage trains, through the method
            `pretrain`, which takes what the call takes.
        choices: the values that a hyper-parameter may have, where they are few.
    """

    paper: ClassVar[str] = ""
    teacher_taps: ClassVar[tuple[str, ...]] = ()
    per_sample: ClassVar[bool] = True
    rotations: ClassVar[bool] = False
    first_stage_params: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def heads(self) -> Mapping[str, str]:
        """See above; the default: none."""
        return {}

    @nn.nowrap
    def check(self, dataset: "Dataset") -> None:
        """Raises `UserError` where the term cannot be applied to this data. The default: never."""

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "Term":
        """The term with what it needs to know of a trained teacher; by default itself."""
        return self

    @nn.nowrap
    def label_loss(self, student: Outputs, batch: "Batch") -> jax.Array | None:
        """The part of the loss that no weighting multiplies, (B,); None where there is none.

        It is added to what the call returns.
        """
        return None

    @nn.nowrap
    def class_mass(self, memory: Mapping[str, jax.Array]) -> np.ndarray | None:
        """(C,) what a term that teaches by itself gives each class in all; None for all others.

        Args:
            memory: the term's variables of that collection.
        """
        return None


@flax.struct.dataclass
class Batch:
    """The rows of one step on one device.

    Attributes:
        image: (B, H, W, channels) float32, augmented and normalised.
        label: (B,) int32 in 0..classes-1.
        index: (B,) int32, position in the training set.
        view: (B,) int32, which of the augmented views of the image this is.
        mask: (B,) float32, 0 for rows that only pad the batch.
        epoch: scalar int32, epochs finished in this stage.
        train_labels: (N,) int32, the labels of the whole training set.
        key: typed PRNG key of this epoch for whatever a term draws; fold the index in.
    """

    image: jax.Array
    label: jax.Array
    index: jax.Array
    view: jax.Array
    mask: jax.Array
    epoch: jax.Array
    train_labels: jax.Array
    key: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each sample with its label.

    The target is `(1 - label_smoothing) * onehot + label_smoothing / C`, as in
    `torch.nn.CrossEntropyLoss`.

    Args:
        logits: (B, C).
        labels: (B,) integers in 0..C-1.
        label_smoothing: mass spread evenly over the classes, in 0..1.

    Returns:
        (B,) loss in nats, of the dtype of `logits`.
    """
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(axis=1)
    return loss


@overload
def gather_rows(axis_name: str | None, array: jax.Array, /) -> jax.Array: ...


@overload
def gather_rows(
    axis_name: str | None, first: jax.Array, second: jax.Array, /, *others: jax.Array
) -> tuple[jax.Array, ...]: ...


def gather_rows(axis_name: str | None, *arrays: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """The rows of all devices, in the order of the global batch: (B, ...) -> (devices B, ...).

    Valid rows come first, those that only pad last. The gradient flows back to each row's device.
    Returns one array for one, and a tuple for several.
    """
    if axis_name is not None:
        arrays = lax.all_gather(arrays, axis_name, tiled=True)
    return arrays if len(arrays) > 1 else arrays[0]


def sum_losses(losses: Iterable[jax.Array]) -> jax.Array:
    """The sum of losses of one shape; 0 where there are none."""
    return jnp.asarray(sum(losses))


def safe_norm(x: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm whose gradient at the zero vector is 0, as PyTorch's, instead of NaN."""
    squares = jnp.square(x).sum(axis, keepdims=keepdims)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def l2_normalize(x: jax.Array, axis: int = -1, eps: float = 1e-12) -> jax.Array:
    """`x / max(norm, eps)` along an axis, as `torch.nn.functional.normalize`; any shape."""
    return x / jnp.maximum(safe_norm(x, axis, keepdims=True), eps)


def adaptive_avg_pool(x: jax.Array, height: int, width: int) -> jax.Array:
    """`torch.nn.functional.adaptive_avg_pool2d`: (B, H, W, C) -> (B, height, width, C).

    Each output pixel is the mean of the input pixels that it touches.
    """

    def windows(inputs: int, outputs: int) -> jax.Array:
        matrix = np.zeros((outputs, inputs))
        for i in range(outputs):
            first, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
            matrix[i, first:end] = 1 / (end - first)
        return jnp.asarray(matrix, x.dtype)

    _, rows, columns, _ = x.shape
    if (rows, columns) == (height, width):
        return x
    # A mean is no product to be rounded, though it is computed as one.
    over_rows, over_columns = windows(rows, height), windows(columns, width)
    return jnp.einsum("oh,bhwc,pw->bopc", over_rows, x, over_columns, precision="highest")


def pool_to_smaller(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two maps (B, H, W, C) with the larger one, by height, pooled to the size of the smaller."""
    if a.shape[1] > b.shape[1]:
        return adaptive_avg_pool(a, *b.shape[1:3]), b
    return a, adaptive_avg_pool(b, *a.shape[1:3])
