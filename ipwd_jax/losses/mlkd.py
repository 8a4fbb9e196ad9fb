"""Jin et al., 2023 (Multi-level logit distillation): predictions, classes and samples of views."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, gather_rows, logits_of_views
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Outputs

# The temperatures besides the term's own. As in the authors' code, the last two belong to the part
# of the strong view, but are applied to the weak one.
_TEMPERATURES, _OF_STRONG, _MISAPPLIED = (3.0, 5.0, 2.0, 6.0), (3.0, 5.0), (2.0, 6.0)


def lower_half(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Which of the valid values are at most their median: (N,), (N,) bool -> (N,) bool.

    The median of an even number of values is the mean of the two in the middle, so a value is at
    most the median if it is at most the lower one of these.
    """
    ordered = jnp.sort(jnp.where(valid, values, jnp.inf))
    return valid & (values <= ordered[(valid.sum() - 1) // 2])


def mlkd_loss(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    temperature: float = 4.0,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    standardize: bool = False,
    selects: bool = False,
) -> jax.Array:
    """The weighted sum of KD at several temperatures and of two losses of Gram matrices.

    With the probabilities P (B, C) of the weak view at one temperature, the matrices are P'P, which
    compares classes, and PP', which compares samples. Their losses are the squared differences
    between the networks, summed, divided by C or B, and summed over the temperatures. KD of the
    weak view and the losses of samples are multiplied by the share of samples whose teacher is at
    most as confident as the median, and those of classes likewise by the share of classes to which
    it gives at most the median probability. Agrees with the authors' code, which multiplies sums by
    these shares where it seems to mean that only these samples and classes count; `selects` does
    the latter.

    Args:
        student: logits (B, C) of the weak and of the strong view.
        teacher: the same of the teacher.
        mask: (B,), 0 for padding rows; at least one row must be valid.
        temperature: T > 0; KD of both views also has 3 and 5, and that of the weak one 2 and 6.
        weights: of KD, of the classes' matrices and of the samples' matrices.
        standardize: whether KD sees standardised logits (`standardize_logits`).
        selects: whether only the samples and classes of the lower halves count.

    Returns:
        Scalar loss.
    """
    valid = mask > 0
    weak, strong = (
        [jnp.where(valid[:, None], x[i], 0) for x in (student, teacher)] for i in (0, 1)
    )
    of_teacher = jnp.where(valid[:, None], jax.nn.softmax(weak[1]), 0)
    samples = lower_half(of_teacher.max(axis=1), valid)
    classes = lower_half(of_teacher.sum(axis=0), jnp.ones(of_teacher.shape[1], bool))
    count = valid.sum(dtype=of_teacher.dtype)

    def kd(view: Sequence[jax.Array], temperatures: tuple[float, ...]) -> jax.Array:
        losses = sum(kd_loss(view[0], view[1], T, standardize=standardize) for T in temperatures)
        return jnp.where(valid, losses, 0)

    def mean(rows: jax.Array, low: jax.Array, size: jax.Array | int) -> jax.Array:
        if selects:
            return jnp.where(low, rows, 0).sum() / size
        return low.sum() / size * rows.sum() / size

    every = (temperature, *_TEMPERATURES)
    of_kd = mean(kd(weak, every), samples, count)
    of_kd += kd(strong, (temperature, *_OF_STRONG)).sum() / count
    of_kd += kd(weak, _MISAPPLIED).sum() / count
    columns, rows = (_differences(weak, valid, every, transposed) for transposed in (True, False))
    of_classes = mean(columns, classes, of_teacher.shape[1])
    of_samples = mean(rows, samples, count)
    return weights[0] * of_kd + weights[1] * of_classes + weights[2] * of_samples


def _differences(
    logits: Sequence[jax.Array], valid: jax.Array, temperatures: Sequence[float], transposed: bool
) -> jax.Array:
    """The squared differences of two networks' Gram matrices, summed over columns and temperatures.

    Returns:
        (B,), or (C,) if the matrices are those of the transposed probabilities.
    """
    total = jnp.zeros((), logits[0].dtype)
    for T in temperatures:
        s, t = (jnp.where(valid[:, None], jax.nn.softmax(z / T), 0) for z in logits)
        total = total + jnp.square(_gram(t, transposed) - _gram(s, transposed)).sum(axis=1)
    return total


def _gram(rows: jax.Array, transposed: bool) -> jax.Array:
    """The products of the rows of a matrix with each other, or those of its columns."""
    rows = rows.T if transposed else rows
    return jnp.matmul(rows, rows.T, precision="highest")


class MLKD(Term):
    """`mlkd_loss` of the two networks' logits for both views, over the rows of all devices.

    The largest intermediate arrays are (C, C) and (B, B), where B counts the rows of all devices.

    Attributes:
        temperature: T; 4, or 2 with standardised logits.
        kd_weight: weight of KD.
        class_weight: weight of the matrices that compare classes.
        sample_weight: weight of the matrices that compare samples.
        standardize: whether KD sees standardised logits (Sun et al., 2024).
        selects: whether only the samples and classes count that the authors' code may mean.
        axis_name: mapped axis over which the rows are distributed.
    """

    temperature: float = 4.0
    kd_weight: float = 1.0
    class_weight: float = 1.0
    sample_weight: float = 1.0
    standardize: bool = False
    selects: bool = False
    axis_name: str | None = None

    paper = "Jin et al., 2023: Multi-level logit distillation"
    teacher_taps = ("logits",)
    per_sample = False
    strong_view = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        rows = *logits_of_views(student), *logits_of_views(teacher), batch.mask
        s_weak, s_strong, t_weak, t_strong, mask = gather_rows(self.axis_name, *rows)
        weights = self.kd_weight, self.class_weight, self.sample_weight
        settings = self.temperature, weights, self.standardize, self.selects
        return mlkd_loss((s_weak, s_strong), (t_weak, t_strong), mask, *settings)
