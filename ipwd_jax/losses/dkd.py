"""Zhao et al., 2022 (Decoupled knowledge distillation): the target and the other classes."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, standardize_logits, warmup_factor
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def split_classes(
    logits: jax.Array, target: jax.Array, temperature: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of one class and the rest, and of the other classes within the rest.

    Args:
        logits: (B, C), C >= 2.
        target: (B, C) bools, one True in each row.
        temperature: T > 0, by which the logits are divided.

    Returns:
        (B, 2) for the target and the rest, and (B, C) for the classes of the rest, where the target
        has 0; both in float32 or better.
    """
    z = at_least_float32(logits) / temperature
    total = jax.nn.logsumexp(z, axis=1)
    rest = jax.nn.logsumexp(z, axis=1, where=~target)
    own = jnp.where(target, z, 0).sum(axis=1)
    within = jnp.where(target, 0, z - rest[:, None])
    return jnp.stack([own - total, rest - total], axis=1), within


def dkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | jax.Array = 4.0,
    standardize: bool = False,
) -> jax.Array:
    """`T^2 (alpha TCKD + beta NCKD)` of each sample.

    TCKD is the KL divergence between the binary distributions of teacher and student over the
    target class and the rest; NCKD is the KL divergence between their distributions over the other
    classes. Agrees with mdistiller, which removes the target from the second softmax by lowering
    its logit by 1000; here it is left out of the sum.

    Args:
        student_logits: (B, C), C >= 2.
        teacher_logits: (B, C).
        labels: (B,) integers in 0..C-1.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T > 0.
        standardize: whether both networks' logits are first standardised (`standardize_logits`).

    Returns:
        (B,) loss in nats, times T^2.
    """
    if standardize:
        student_logits, teacher_logits = map(standardize_logits, (student_logits, teacher_logits))
    target = jax.nn.one_hot(labels, student_logits.shape[1], dtype=bool)
    binary_s, rest_s = split_classes(student_logits, target, temperature)
    binary_t, rest_t = split_classes(teacher_logits, target, temperature)
    tckd = jnp.sum(jnp.exp(binary_t) * (binary_t - binary_s), axis=1)
    nckd = jnp.sum(jnp.exp(rest_t) * (rest_t - rest_s), axis=1)  # the target contributes 1 * 0
    return temperature**2 * (alpha * tckd + beta * nckd)


class DKD(Term):
    """`dkd_loss` of the two networks' logits, ramped up over the first epochs, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        alpha: weight of TCKD.
        beta: weight of NCKD. It depends on the pair of networks: 8 for most pairs on CIFAR-100, 6
            or 2 for some.
        temperature: T; 4 on CIFAR-100, 1 on ImageNet.
        warmup: number of epochs over which the factor of the loss rises to 1. As in the reference,
            epochs are counted from 1, so the factor is `1 / warmup` in the first epoch.
        standardize: whether both networks' logits are first standardised (Sun et al., 2024).
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup: int = 20
    standardize: bool = False

    paper = "Zhao et al., 2022: Decoupled knowledge distillation"
    teacher_taps = ("logits",)
    not_negative = ("alpha", "beta")

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        settings = self.alpha, self.beta, self.temperature, self.standardize
        loss = dkd_loss(student.logits, teacher.logits, batch.label, *settings)
        return warmup_factor(batch, self.warmup).astype(loss.dtype) * loss
