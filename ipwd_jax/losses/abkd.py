"""Wang et al., 2025 (ABKD): the alpha-beta-divergence between teacher and student."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def abkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alpha: float = 0.8,
    beta: float = 0.3,
    temperature: float = 4.0,
) -> jax.Array:
    """The alpha-beta-divergence of each sample, from the teacher's probabilities p to q.

    `sum_c p^(a+b) / (b (a+b)) + q^(a+b) / (a (a+b)) - p^a q^b / (a b)`, with a = alpha, b = beta,
    and the probabilities at temperature T. There is no factor T^2. For a = 1, the limit b = 0 is
    the KL divergence of KD. Agrees with `ABKL` of the authors' code.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        alpha: a, not 0.
        beta: b, neither 0 nor -a.
        temperature: T > 0.

    Returns:
        (B,) loss, in float32 or better.

    Raises:
        ValueError: alpha, beta or their sum is 0.
    """
    both = alpha + beta
    if 0 in (alpha, beta, both):
        raise ValueError(
            "the alpha-beta-divergence divides by alpha, beta and their sum, none of which may be "
            f"0; found config.terms.abkd.alpha={alpha} and config.terms.abkd.beta={beta}"
        )
    log_q, log_p = (
        jax.nn.log_softmax(at_least_float32(x) / temperature)
        for x in (student_logits, teacher_logits)
    )
    of_teacher = jnp.exp(both * log_p) / (beta * both)
    of_student = jnp.exp(both * log_q) / (alpha * both)
    common = jnp.exp(alpha * log_p + beta * log_q) / (alpha * beta)
    return jnp.sum(of_teacher + of_student - common, axis=1)


class ABKD(Term):
    """`abkd_loss` of the two networks' logits, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        alpha: exponent of the teacher's probabilities.
        beta: exponent of the student's probabilities.
        temperature: T.
    """

    alpha: float = 0.8
    beta: float = 0.3
    temperature: float = 4.0

    paper = "Wang et al., 2025: Alpha-beta-divergence in knowledge distillation"
    teacher_taps = ("logits",)
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        settings = self.alpha, self.beta, self.temperature
        return abkd_loss(student.logits, teacher.logits, *settings)
