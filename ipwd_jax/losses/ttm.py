"""Zheng and Yang, 2024 (Transformed teacher matching): a power transform of the teacher alone."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def ttm_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, gamma: float, weighted: bool = False
) -> jax.Array:
    """`KL(q || softmax(student))` of each sample, where q is proportional to `p^gamma`.

    p is the teacher's softmax, and the sum of `p^gamma` over the classes is U. The student has no
    temperature, and the loss no factor T^2. Agrees with the authors' code.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        gamma: exponent, the inverse of a temperature of the teacher.
        weighted: whether the loss of each sample is multiplied by U, which is the larger the less
            certain the teacher is, if gamma is below 1 (WTTM).

    Returns:
        (B,) loss in nats, in float32 or better.
    """
    log_s, log_t = map(jax.nn.log_softmax, at_least_float32((student_logits, teacher_logits)))
    log_u = jax.nn.logsumexp(gamma * log_t, axis=1)
    log_q = gamma * log_t - log_u[:, None]
    loss = jnp.sum(jnp.exp(log_q) * (log_q - log_s), axis=1)
    return jnp.exp(log_u) * loss if weighted else loss


class TTM(Term):
    """`ttm_loss` of the two networks' logits, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        gamma: exponent of the teacher's probabilities.
    """

    gamma: float = 0.1

    paper = "Zheng and Yang, 2024: Transformed teacher matching"
    teacher_taps = ("logits",)
    mixed_images = True
    _weighted: ClassVar[bool] = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return ttm_loss(student.logits, teacher.logits, self.gamma, self._weighted)


class WTTM(TTM):
    """`TTM` with the teacher's weight of each sample."""

    gamma: float = 0.2

    paper = "Zheng and Yang, 2024: Weighted transformed teacher matching"
    _weighted = True
