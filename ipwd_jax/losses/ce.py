"""Cross-entropy with the labels: of the student's own logits, and of its extra `cls` head."""

from typing import ClassVar

import flax.linen as nn

from ipwd_jax.losses.base import Batch, cross_entropy
from ipwd_jax.models.base import Outputs


class CrossEntropy(nn.Module):
    """`CE(logits, label)`, per sample.

    Attributes:
        label_smoothing: mass spread evenly over the classes (0.1 in Szegedy et al., 2016).
    """

    label_smoothing: float = 0.0

    needs_teacher: ClassVar[bool] = False
    heads: ClassVar[dict[str, bool]] = {}

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch):
        return cross_entropy(student.logits, batch.label, self.label_smoothing)


class ClsHead(nn.Module):
    """`CE(extra_logits["cls"], label)`, per sample: trains the head that IPWD compares with.

    Niu et al., 2022: the CLS-trained output is one extra linear head on the student's backbone,
    which sees the labels and never the teacher.

    Attributes:
        backbone_gradient: whether this loss also trains the backbone. The paper does not say; with
          True the backbone gets one more cross-entropy, so compare with a run that has this term
          and uniform weights.
    """

    backbone_gradient: bool = True

    needs_teacher: ClassVar[bool] = False

    @property
    def heads(self) -> dict[str, bool]:
        return {"cls": self.backbone_gradient}

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch):
        return cross_entropy(student.extra_logits["cls"], batch.label)
