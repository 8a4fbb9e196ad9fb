"""Sun et al., 2024 (Refined logit distillation): labels correct what the teacher has wrong."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, standardize_logits, warmup_factor
from ipwd_jax.losses.dkd import split_classes
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def _log_softmax_among(logits: jax.Array, among: jax.Array) -> jax.Array:
    """Log-softmax over the classes that are True in `among`, and 0 for the others; (B, C)."""
    # A sample without such classes would have the logarithm of an empty sum.
    used = among | ~among.any(axis=1, keepdims=True)
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True, where=used)
    return jnp.where(among, logits - total, 0)


def rld_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 4.0,
    standardize: bool = False,
) -> jax.Array:
    """`alpha SCD + beta MCD` of each sample.

    SCD is the KL divergence, times the squared temperature, of two binary distributions: the
    probability of the teacher's first class and the rest, and the student's probability of the
    label and the rest. MCD is the KL divergence, times T^2, between the two networks' distributions
    over the classes that the teacher ranks below the label; it is 0 if there are none. Agrees with
    `rld_loss` of the authors' code.

    Args:
        student_logits: (B, C), C >= 2.
        teacher_logits: (B, C).
        labels: (B,) integers in 0..C-1.
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: T > 0 of MCD.
        confidence_temperature: that of SCD.
        standardize: whether both networks' logits are first standardised (`standardize_logits`).

    Returns:
        (B,) loss in nats, in float32 or better.
    """
    student, teacher = (
        standardize_logits(x) if standardize else at_least_float32(x)
        for x in (student_logits, teacher_logits)
    )
    target, first = (
        jax.nn.one_hot(x, student.shape[1], dtype=bool) for x in (labels, teacher.argmax(axis=1))
    )
    binary_s, _ = split_classes(student, target, confidence_temperature)
    binary_t, _ = split_classes(teacher, first, confidence_temperature)
    scd = jnp.sum(jnp.exp(binary_t) * (binary_t - binary_s), axis=1)
    below = teacher < jnp.where(target, teacher, 0).sum(axis=1, keepdims=True)
    log_s, log_t = (_log_softmax_among(x / temperature, below) for x in (student, teacher))
    mcd = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=1)  # other classes contribute 1 * 0
    return alpha * confidence_temperature**2 * scd + beta * temperature**2 * mcd


class RLD(Term):
    """`rld_loss` of the two networks' logits, ramped up over the first epochs, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: T of MCD.
        confidence_temperature: temperature of SCD.
        warmup: number of epochs over which the factor of the loss rises to 1, as in DKD.
        standardize: whether both networks' logits are first standardised (Sun et al., CVPR 2024).
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    confidence_temperature: float = 4.0
    warmup: int = 20
    standardize: bool = False

    paper = "Sun et al., 2024: Knowledge distillation with refined logits"
    teacher_taps = ("logits",)
    not_negative = ("alpha", "beta")

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        loss = rld_loss(
            student.logits,
            teacher.logits,
            batch.label,
            self.alpha,
            self.beta,
            self.temperature,
            self.confidence_temperature,
            self.standardize,
        )
        return warmup_factor(batch, self.warmup).astype(loss.dtype) * loss
