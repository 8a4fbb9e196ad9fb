"""Hinton et al., 2015: match the teacher's softened answers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.models.base import Outputs


def kd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
    cross_entropy: bool = False,
) -> jax.Array:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of each sample.

    Agrees with RepDistiller's `DistillKL`; with `cross_entropy` with the soft term of WSLD, which
    leaves the teacher's entropy in (another value, the same gradient).

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: T > 0.
        cross_entropy: `H(teacher, student)` in place of the KL divergence.

    Returns:
        (B,) loss in nats, times T^2.
    """
    log_s = jax.nn.log_softmax(student_logits / temperature)
    log_t = jax.nn.log_softmax(teacher_logits / temperature)
    gap = -log_s if cross_entropy else log_t - log_s
    return temperature**2 * jnp.sum(jnp.exp(log_t) * gap, axis=1)


class KD(Term):
    """`kd_loss` of the student's and the teacher's logits, per sample.

    Attributes:
        temperature: T; 4 on CIFAR-100 (Tian et al., 2020).
        cross_entropy: leave the teacher's entropy in the value, as WSLD does.
    """

    temperature: float = 4.0
    cross_entropy: bool = False

    paper = "Hinton et al., 2015: Distilling the knowledge in a neural network"
    teacher_taps = ("logits",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return kd_loss(student.logits, teacher.logits, self.temperature, self.cross_entropy)


class KDHead(KD):
    """`kd_loss` of the extra head `kd`, which sees the teacher and never the labels: IPWD-dagger.

    Niu et al., 2022, appendix: a third head gives the distilled output that the weights are taken
    from, while the student's own head still predicts. Set `weighting.kd_source` to "head".

    Attributes:
        source: "backbone", its loss also trains the backbone, or "detached".
    """

    source: str = "backbone"

    paper = "Niu et al., 2022: IPWD-dagger"
    choices = {"source": ("backbone", "detached")}  # noqa: RUF012

    @property
    def heads(self) -> Mapping[str, str]:
        return {"kd": self.source}

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        logits = student.extra_logits["kd"]
        return kd_loss(logits, teacher.logits, self.temperature, self.cross_entropy)
