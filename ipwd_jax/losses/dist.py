"""Huang et al., 2022 (Knowledge distillation from a stronger teacher): match correlations."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, gather_rows, safe_norm
from ipwd_jax.models.base import Outputs

_EPS = 1e-8


def _cosine(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return (a * b).sum(axis) / (safe_norm(a, axis) * safe_norm(b, axis) + _EPS)


def dist_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """`T^2 (beta (1 - inter) + gamma (1 - intra))`, two mean correlations of the probabilities.

    `inter` is Pearson's correlation of the two networks' probabilities of one sample over the
    classes, averaged over the samples; `intra` is that of one class over the samples of the batch,
    averaged over the classes. The denominator of a correlation is increased by 1e-8. Agrees with
    the authors' code for CIFAR; the pseudo-code in the paper has no factor T^2.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        mask: (B,), 0 for padding rows; at least one row must be valid.
        beta: weight of the part that compares classes.
        gamma: weight of the part that compares samples.
        temperature: T > 0.

    Returns:
        Scalar loss, in float32 or better.
    """
    valid = mask[:, None] > 0
    dtype = jnp.promote_types(student_logits.dtype, jnp.float32)
    logits = (jnp.where(valid, x.astype(dtype), 0) for x in (student_logits, teacher_logits))
    p, q = (jnp.where(valid, jax.nn.softmax(z / temperature), 0) for z in logits)
    count = valid.sum(dtype=dtype)

    def over_classes(x: jax.Array) -> jax.Array:
        return jnp.where(valid, x - x.mean(axis=1, keepdims=True), 0)

    def over_samples(x: jax.Array) -> jax.Array:
        return jnp.where(valid, x - x.sum(axis=0, keepdims=True) / count, 0)

    inter = _cosine(over_classes(p), over_classes(q), axis=1).sum() / count
    intra = _cosine(over_samples(p), over_samples(q), axis=0).mean()
    return temperature**2 * (beta * (1 - inter) + gamma * (1 - intra))


class DIST(Term):
    """`dist_loss` of the two networks' logits, over the rows of all devices.

    The largest intermediate array is (B, C), the logits, where B counts the rows of all devices.

    Attributes:
        beta: weight of the part that compares classes.
        gamma: weight of the part that compares samples.
        temperature: T; 4 on CIFAR-100, 1 on ImageNet.
        axis_name: mapped axis over which the rows are distributed.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 4.0
    axis_name: str | None = None

    paper = "Huang et al., 2022: Knowledge distillation from a stronger teacher"
    teacher_taps = ("logits",)
    not_negative = ("beta",)
    mixed_images = True
    per_sample = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        s, t, mask = gather_rows(self.axis_name, student.logits, teacher.logits, batch.mask)
        return dist_loss(s, t, mask, self.beta, self.gamma, self.temperature)
