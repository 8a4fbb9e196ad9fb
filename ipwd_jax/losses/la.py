"""KD with logit adjustment: the class prior of Menon et al., 2021, inside the distillation loss.

Niu et al., 2022 (IPWD), compare with it and say only that the prior is applied to the student's
output when the KL divergence is computed. Because labels may be balanced, the prior is taken to be
the teacher's mean probabilities. The paper does not say whether the prior is added before or after
the division by the temperature, so this is an option.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32

if TYPE_CHECKING:
    from ipwd_jax.teacher import Teacher


def kd_la_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    class_prior: jax.Array | Sequence[float] = (),
    temperature: float = 4.0,
    tau: float = 1.0,
    after_temperature: bool = False,
) -> jax.Array:
    """`kd_loss` with `tau ln prior` added to the student's logits.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        class_prior: (C,) probabilities; if (), the prior is uniform and nothing is adjusted.
        temperature: T > 0.
        tau: strength of the adjustment; 0 gives plain KD.
        after_temperature: whether to add it to `logits / T` instead of to the logits.

    Returns:
        (B,) loss in nats, times T^2.
    """
    student, teacher = (at_least_float32(x) for x in (student_logits, teacher_logits))
    if len(class_prior):
        prior = jnp.asarray(class_prior, student.dtype)
        log_prior = jnp.log(jnp.maximum(prior, jnp.finfo(prior.dtype).tiny))
        strength = tau * temperature if after_temperature else tau
        student = student + strength * log_prior[None]
    return kd_loss(student, teacher, temperature)


class KDLA(Term):
    """`kd_la_loss` of the two networks' logits, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        temperature: T.
        tau: strength of the adjustment.
        after_temperature: whether to add the logarithm of the prior after the division by T.
        prior_temperature: temperature of the probabilities whose mean is the prior.
        class_prior: (C,) the teacher's mean probabilities over the training set; () is uniform.
    """

    temperature: float = 4.0
    tau: float = 1.0
    after_temperature: bool = False
    prior_temperature: float = 1.0
    class_prior: tuple = ()

    paper = "Menon et al., 2021: Logit adjustment"
    teacher_taps = ("logits",)
    mixed_images = True

    @nn.nowrap
    def unread(self) -> dict[str, str]:
        """How the prior is computed and applied, if the strength of the adjustment is 0."""
        return {} if self.tau else {"prior_temperature": "tau", "after_temperature": "tau"}

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "KDLA":
        """The term with the teacher's mean probabilities as its class prior."""
        mass = teacher.class_mass(self.prior_temperature)
        return self.clone(class_prior=tuple((mass / mass.sum()).tolist()))

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return kd_la_loss(
            student.logits,
            teacher.logits,
            self.class_prior,
            self.temperature,
            self.tau,
            self.after_temperature,
        )
