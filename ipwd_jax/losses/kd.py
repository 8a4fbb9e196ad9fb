"""Hinton et al., 2015: match the teacher's softened predictions."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, standardize_logits
from ipwd_jax.models.base import Outputs


def kd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array,
    cross_entropy: bool = False,
    standardize: bool = False,
) -> jax.Array:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of each sample.

    Agrees with `DistillKL` of RepDistiller and, with `cross_entropy`, with the soft term of WSLD,
    which does not subtract the teacher's entropy; the value then differs, but the gradient does
    not.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: T > 0.
        cross_entropy: whether to compute `H(teacher, student)` instead of the KL divergence.
        standardize: whether both networks' logits are first standardised (`standardize_logits`).

    Returns:
        (B,) loss in nats, times T^2.
    """
    if standardize:
        student_logits, teacher_logits = map(standardize_logits, (student_logits, teacher_logits))
    log_s = jax.nn.log_softmax(student_logits / temperature)
    log_t = jax.nn.log_softmax(teacher_logits / temperature)
    gap = -log_s if cross_entropy else log_t - log_s
    return temperature**2 * jnp.sum(jnp.exp(log_t) * gap, axis=1)


class KD(Term):
    """`kd_loss` of the student's and the teacher's logits, per sample.

    Attributes:
        temperature: T; 4 on CIFAR-100 (Tian et al., 2020).
        cross_entropy: whether to keep the teacher's entropy in the value, as WSLD does.
        standardize: whether both networks' logits are first standardised (Sun et al., 2024).
    """

    temperature: float = 4.0
    cross_entropy: bool = False
    standardize: bool = False

    paper = "Hinton et al., 2015: Distilling the knowledge in a neural network"
    teacher_taps = ("logits",)
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return self.loss(student.logits, teacher)

    def loss(self, logits: jax.Array, teacher: Outputs) -> jax.Array:
        """`kd_loss` of a head's logits (B, C) with the settings of the term."""
        settings = self.temperature, self.cross_entropy, self.standardize
        return kd_loss(logits, teacher.logits, *settings)


class KDHead(KD):
    """`kd_loss` of the extra head `kd`, which sees the teacher but never the labels (IPWD-dagger).

    In the appendix of Niu et al., 2022, a third head provides the distilled output from which the
    weights are computed, while the student's own head still makes the predictions. To use it, set
    `weighting.kd_source` to "head".

    Attributes:
        source: "backbone" if the loss of the head also trains the backbone, otherwise "detached".
    """

    source: str = "backbone"

    paper = "Niu et al., 2022: IPWD-dagger"
    choices = {"source": ("backbone", "detached")}  # noqa: RUF012

    @property
    def heads(self) -> Mapping[str, str]:
        return {"kd": self.source}

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return self.loss(student.extra_logits["kd"], teacher)
