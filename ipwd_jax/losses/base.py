"""The base class of loss terms, the values that they see, and functions that several terms use.

A term is a small `flax.linen` module. Its fields are its hyper-parameters. Its call takes
`(student: Outputs, teacher: Outputs | None, batch: Batch)` and returns the loss of each sample,
shape (B,), or a scalar if it compares samples with each other. Trainable parameters, running
statistics and memories are ordinary linen variables in the collections `params`, `batch_stats`
and `memory`, which the train step carries from step to step. The class attributes of a term
declare what it needs from the rest of the program.

If a term has one of the fields in `RUN_FIELDS`, the run sets it. A term sees the rows of one
device; a term that compares rows must first call `gather_rows`, and must ignore padding rows.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, overload

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32
from ipwd_jax.typing import PyTree

if TYPE_CHECKING:
    from ipwd_jax.data.base import Dataset
    from ipwd_jax.teacher import Teacher

RUN_FIELDS = {
    "axis_name": "mapped axis over which the global batch is distributed; None: one device",
    "train_size": "number of training samples",
    "epochs": "number of epochs in the stage",
    "class_prior": "(C,) the teacher's mean probabilities over the training set",
    "class_distances": "(C, C) distances between the classes, as the teacher sees them",
    "preact_norms": "gammas and betas of the BatchNorm that feeds each of the teacher's `preact`",
}


class Term(nn.Module):
    """The base class of all loss terms; its attributes declare what a term needs.

    Attributes:
        paper: source of the loss: author and year, a colon, and a short title.
        teacher_taps: names of the fields of the teacher's `Outputs` that the term reads; if empty,
            the term needs no teacher.
        per_sample: whether the term returns (B,), which a weighting can multiply. If False, it
            compares samples and returns a scalar.
        heads: extra heads of the student whose logits the term reads, each with its source:
            "backbone" if the gradient reaches the backbone, "detached" if it does not, "network"
            for a separate network.
        rotations: whether the term sees every image in four rotations, as 4 B rows, with the four
            rows of an image next to each other.
        strong_view: whether the term also sees a strong view of every image (`data.views.strong`),
            for which both networks are run a second time; their outputs are `Outputs.strong`. The
            cross-entropy `ce` is then that of both views together.
        replaces_head: whether the predictions of a run with the term are those of the head that the
            method `replacement_head` makes. The outputs of the student, which the term sees, are
            then those of that head.
        first_stage_params: parts of `params` that are trained only in a first stage, by the method
            `pretrain`, which takes the same arguments as the call.
        mixed_images: whether the term is defined for images that MixUp or CutMix has mixed. If it
            reads the labels, it must do so by `Batch.over_labels`.
        choices: the allowed values of each hyper-parameter that has only a few.
        not_negative: names of hyper-parameters that must not be negative.
    """

    paper: ClassVar[str] = ""
    teacher_taps: ClassVar[tuple[str, ...]] = ()
    per_sample: ClassVar[bool] = True
    rotations: ClassVar[bool] = False
    strong_view: ClassVar[bool] = False
    replaces_head: ClassVar[bool] = False
    first_stage_params: ClassVar[tuple[str, ...]] = ()
    mixed_images: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    not_negative: ClassVar[tuple[str, ...]] = ()

    @property
    def heads(self) -> Mapping[str, str]:
        """The extra heads that the term reads, none by default; see the class attributes."""
        return {}

    @nn.nowrap
    def unread(self) -> Mapping[str, str]:
        """The hyper-parameters that have no effect because of another one, which is named by each.

        A run whose config changes one of them prints a warning.
        """
        return {}

    @nn.nowrap
    def check(self, dataset: "Dataset", teacher: nn.Module | None) -> None:
        """Raise `UserError` if the term does not fit the data or the teacher; never by default.

        Args:
            dataset: data set of the run.
            teacher: the network of the teacher, which may not be trained yet; None without one.
        """

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "Term":
        """The term with what it needs to know about a trained teacher; by default unchanged."""
        return self

    @nn.nowrap
    def replacement_head(self, teacher: Outputs, axis_name: str | None) -> nn.Module | None:
        """The head of the student, as `models.with_head` describes it, if `replaces_head` is set.

        Args:
            teacher: outputs of the teacher, of which only the shapes matter.
            axis_name: mapped axis over which batch statistics are synchronised.

        Raises:
            ValueError: there is no such head for this teacher.
        """
        return None

    @nn.nowrap
    def inherited(self, teacher: "Teacher") -> Mapping[tuple[str, ...], np.ndarray]:
        """The parameters of the head that are a trained teacher's, by their paths; none by default.

        They must belong to the `frozen_modules` of the head.
        """
        return {}

    @nn.nowrap
    def label_loss(self, student: Outputs, batch: "Batch") -> jax.Array | None:
        """The part of the loss, (B,), that no weighting multiplies; None if there is no such part.

        The train step adds it to the loss that the call returns.
        """
        return None

    @nn.nowrap
    def scalars(self, variables: Mapping[str, PyTree]) -> dict[str, float]:
        """Numbers that a run reports after each epoch, by name; none by default.

        The number `x` of the term `TERM` is the metric `TERM_x`.

        Args:
            variables: the term's variables by collection.
        """
        return {}

    @nn.nowrap
    def class_mass(self, memory: Mapping[str, jax.Array]) -> np.ndarray | None:
        """The total probability that a self-distillation term's targets give each class, (C,).

        All other terms return None.

        Args:
            memory: the term's variables in the collection `memory`.
        """
        return None


@flax.struct.dataclass
class Batch:
    """The rows that one device processes in one step.

    Attributes:
        image: (B, H, W, channels) float32, augmented and normalised.
        label: (B,) int32 in 0..classes-1.
        index: (B,) int32, positions in the training set.
        view: (B,) int32, which augmented view of the image this is; 0 if images are streamed.
        mask: (B,) float32, 0 for padding rows and 1 for all others.
        epoch: scalar int32, number of epochs finished in this stage.
        train_labels: (N,) int32, the labels of the whole training set.
        key: typed PRNG key of this epoch for anything that a term draws; fold the index into it.
        partner_label: (B,) int32, the label of the sample that each one is mixed with; None if
            images are not mixed.
        share: (B,) float32, the share of the sample itself in its mixed image; None likewise.
        strong_image: (B, H, W, channels), strong views of the images; None if no term asks for
            them.
    """

    image: jax.Array
    label: jax.Array
    index: jax.Array
    view: jax.Array
    mask: jax.Array
    epoch: jax.Array
    train_labels: jax.Array
    key: jax.Array
    partner_label: jax.Array | None = None
    share: jax.Array | None = None
    strong_image: jax.Array | None = None

    def over_labels(self, of: Callable[[jax.Array], PyTree]) -> PyTree:
        """`of(label)`, or its mean over the two labels of a mixed image, weighted by their shares.

        Args:
            of: a function of labels (B,) that returns arrays (B,).
        """
        if self.partner_label is None or self.share is None:
            return of(self.label)
        share = self.share
        return jax.tree.map(
            lambda own, other: share * own + (1 - share) * other,
            of(self.label),
            of(self.partner_label),
        )


def as_seen(term: Term, outputs: Outputs | None) -> Outputs | None:
    """A network's outputs in the form in which the step gives them to a term.

    Args:
        term: the term, which may ask for rotations or for strong views.
        outputs: outputs for B images, of which only the shapes and types are meant to matter.
    """
    if outputs is not None and term.rotations:
        outputs = outputs.map_rows(lambda rows: jnp.repeat(rows, 4, axis=0))
    return outputs.with_strong(outputs) if outputs is not None and term.strong_view else outputs


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each sample with respect to its label.

    The target is `(1 - label_smoothing) * onehot + label_smoothing / C`, as in
    `torch.nn.CrossEntropyLoss`.

    Args:
        logits: (B, C).
        labels: (B,) integers in 0..C-1.
        label_smoothing: probability mass spread evenly over the classes, in 0..1.

    Returns:
        (B,) loss in nats, of the dtype of `logits`.
    """
    log_p = jax.nn.log_softmax(logits)
    # The gradient of a selection is elementwise; that of an indexing operation is a scatter.
    is_own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    loss = -jnp.sum(log_p, axis=1, where=is_own)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(axis=1)
    return loss


def warmup_factor(batch: Batch, warmup: int) -> jax.Array:
    """The factor of a loss that rises to 1 over the first `warmup` epochs, counted from 1."""
    return jnp.minimum((batch.epoch + 1) / max(warmup, 1), 1)


def standardize_logits(logits: jax.Array) -> jax.Array:
    """The logits minus their mean, divided by their standard deviation, of each sample.

    Sun et al., 2024 (Logit standardization in knowledge distillation, eq. 9). As in the authors'
    code, the deviation is the unbiased one, and 1e-7 is added to it. If all logits of a sample are
    equal, the result and its gradient are 0, where the formula would multiply the gradient by 1e7.

    Args:
        logits: (B, C).

    Returns:
        (B, C), in float32 or better.
    """
    z = at_least_float32(logits)
    constant = z.max(axis=1, keepdims=True) == z.min(axis=1, keepdims=True)
    z = jnp.where(constant, 0, z)
    z = z - z.mean(axis=1, keepdims=True)
    deviation = safe_norm(z, keepdims=True) / max(z.shape[1] - 1, 1) ** 0.5
    return z / (deviation + 1e-7)


@overload
def gather_rows(axis_name: str | None, array: jax.Array, /) -> jax.Array: ...


@overload
def gather_rows(
    axis_name: str | None, first: jax.Array, second: jax.Array, /, *others: jax.Array
) -> tuple[jax.Array, ...]: ...


def gather_rows(axis_name: str | None, *arrays: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """The rows of all devices, in the order of the global batch: (B, ...) -> (devices B, ...).

    Valid rows come first and padding rows last. The gradient of each row flows back to its device.
    Returns an array if one array is given, and a tuple if several are given.
    """
    if axis_name is not None:
        arrays = lax.all_gather(arrays, axis_name, tiled=True)
    return arrays if len(arrays) > 1 else arrays[0]


def pre_pool_of(outputs: Outputs) -> jax.Array:
    """The map (B, H, W, D) before the pooling, in float32 or better.

    Raises:
        ValueError: the network does not return it.
    """
    return _tap(outputs, "pre_pool")


def logits_of_views(outputs: Outputs) -> tuple[jax.Array, jax.Array]:
    """Logits (B, C) of the weak and of the strong view, in float32 or better.

    Raises:
        ValueError: there is no strong view, for which a term must ask (`Term.strong_view`).
    """
    if outputs.strong is None:
        raise ValueError("a loss term reads `Outputs.strong` without declaring `strong_view`")
    return at_least_float32(outputs.logits), at_least_float32(outputs.strong.logits)


def classifier_of(outputs: Outputs) -> tuple[jax.Array, jax.Array]:
    """Kernel (D, C) and bias (C,) of the network's classifier, in float32 or better.

    Raises:
        ValueError: the network does not return them.
    """
    return _tap(outputs, "classifier")


def _tap(outputs: Outputs, field: str) -> PyTree:
    if (found := getattr(outputs, field)) is None:
        raise ValueError(
            f"a loss term reads `{field}`, which the `Outputs` of a network lack; let the network "
            "return `ipwd_jax.models.base.pool_and_classify(...)`, or choose another network"
        )
    return at_least_float32(found)


def late_decay(epoch: jax.Array, decay_from: int, epochs: int) -> jax.Array:
    """A factor that falls from 1 to 0 as half a cosine, from epoch `decay_from` to the last.

    Args:
        epoch: number of epochs finished; the factor is that of the next epoch.
        decay_from: last epoch, counted from 1, in which the factor is still 1.
        epochs: number of epochs in the stage. The factor is 0 in the last one.
    """
    share = (epoch + 1 - decay_from) / max(epochs - decay_from, 1)
    return (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1))) / 2


def sum_losses(losses: Iterable[jax.Array]) -> jax.Array:
    """The sum of losses of the same shape, or 0 if there are none."""
    return jnp.asarray(sum(losses))


def safe_norm(x: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm whose gradient at the zero vector is 0, as in PyTorch, instead of NaN."""
    squares = jnp.square(x).sum(axis, keepdims=keepdims)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def l2_normalize(x: jax.Array, axis: int = -1, eps: float = 1e-12) -> jax.Array:
    """`x / max(norm, eps)` along an axis, as in `torch.nn.functional.normalize`; any shape."""
    return x / jnp.maximum(safe_norm(x, axis, keepdims=True), eps)


def adaptive_avg_pool(x: jax.Array, height: int, width: int) -> jax.Array:
    """Average pooling to a given size: (B, H, W, C) -> (B, height, width, C).

    Each output pixel is the mean of the input pixels that it overlaps, as in
    `torch.nn.functional.adaptive_avg_pool2d`.
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
    # The mean is computed as a matrix product, but its operands must not be rounded like those of
    # other products.
    over_rows, over_columns = windows(rows, height), windows(columns, width)
    return jnp.einsum("oh,bhwc,pw->bopc", over_rows, x, over_columns, precision="highest")


def pool_to_smaller(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two maps (B, H, W, C), the one with the greater height pooled to the size of the other."""
    if a.shape[1] > b.shape[1]:
        return adaptive_avg_pool(a, *b.shape[1:3]), b
    return a, adaptive_avg_pool(b, *a.shape[1:3])
