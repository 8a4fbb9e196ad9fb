"""Cross-entropy with the labels, for the student's own logits and for its extra `cls` head."""

from collections.abc import Mapping

import jax

from ipwd_jax.losses.base import Batch, Term, cross_entropy, sum_losses
from ipwd_jax.models.base import Outputs


class CrossEntropy(Term):
    """`CE(logits, label)`, per sample; if another term asks for a strong view, the sum of both.

    Attributes:
        label_smoothing: probability mass spread evenly over the classes (0.1 in Szegedy et al.,
            2016).
    """

    label_smoothing: float = 0.0

    paper = "Szegedy et al., 2016: Label smoothing"
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> jax.Array:
        views = [student] if student.strong is None else [student, student.strong]
        return batch.over_labels(
            lambda label: sum_losses(
                cross_entropy(view.logits, label, self.label_smoothing) for view in views
            )
        )


class ClsHead(Term):
    """`CE(extra_logits["cls"], label)`, per sample; it trains the label-only head of IPWD.

    In Niu et al., 2022, the CLS-trained output is an extra linear head on the student's backbone,
    which sees the labels but never the teacher. In IPWD* it is a separate network with the
    student's architecture.

    Attributes:
        source: "backbone" for a linear head whose loss also trains the backbone; "detached" for a
            linear head whose loss does not; "network" for a separate network (IPWD*). The paper
            does not say which of the first two it uses. With "backbone", the backbone is trained
            with one more cross-entropy, so compare with a run that has this term and uniform
            weights.
    """

    source: str = "backbone"

    paper = "Niu et al., 2022: IPWD"
    mixed_images = True
    choices = {"source": ("backbone", "detached", "network")}  # noqa: RUF012

    @property
    def heads(self) -> Mapping[str, str]:
        return {"cls": self.source}

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> jax.Array:
        logits = student.extra_logits["cls"]
        return batch.over_labels(lambda label: cross_entropy(logits, label))
