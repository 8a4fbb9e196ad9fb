"""Zhao et al., 2022 (Decoupled knowledge distillation): the target and the other classes."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs


def dkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
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

    Returns:
        (B,) loss in nats, times T^2.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[1], dtype=bool)

    def split(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities (B, 2) of target and rest, and (B, C) within the rest (target: 0)."""
        z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
        total = jax.nn.logsumexp(z, axis=1)
        rest = jax.nn.logsumexp(z, axis=1, where=~target)
        own = jnp.where(target, z, 0).sum(axis=1)
        within = jnp.where(target, 0, z - rest[:, None])
        return jnp.stack([own - total, rest - total], axis=1), within

    (binary_s, rest_s), (binary_t, rest_t) = split(student_logits), split(teacher_logits)
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
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup: int = 20

    paper = "Zhao et al., 2022: Decoupled knowledge distillation"
    teacher_taps = ("logits",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        loss = dkd_loss(
            student.logits, teacher.logits, batch.label, self.alpha, self.beta, self.temperature
        )
        ramp = jnp.minimum((batch.epoch + 1) / max(self.warmup, 1), 1)
        return ramp.astype(loss.dtype) * loss
