"""Chen et al., 2022 (SimKD): the teacher's classifier reads the student's projected map."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax.losses.base import (
    Batch,
    Term,
    adaptive_avg_pool,
    classifier_of,
    pool_to_smaller,
    pre_pool_of,
)
from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, pool_and_classify, relu

if TYPE_CHECKING:
    from ipwd_jax.teacher import Teacher


class Projector(nn.Module):
    """Three convolutions, the middle one of 3 x 3 pixels, each with BatchNorm and ReLU.

    Attributes:
        width: channels of the result.
        factor: by how many times the first two convolutions are narrower.
        train: as in `BatchNorm`.
        axis_name: as in `BatchNorm`.
    """

    width: int
    factor: int
    train: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, width); `mask` as in `BatchNorm`."""
        middle = self.width // self.factor
        for i, (width, kernel) in enumerate(((middle, 1), (middle, 3), (self.width, 1))):
            x = Conv(width, kernel, name=f"{3 * i}")(x)
            norm = BatchNorm(train=self.train, axis_name=self.axis_name, name=f"{3 * i + 1}")
            x = relu(norm(x, mask))
        return x


class ReusedClassifier(nn.Module):
    """A head that brings the student's last map to the shape of the teacher's and classifies it.

    A map that is larger than the teacher's is first averaged to its size. The classifier is that of
    the teacher and is not trained.

    Attributes:
        shape: (H, W, D) of the map that the teacher pools.
        classes: number of logits.
        factor: as in `Projector`.
        axis_name: as in `BatchNorm`.
    """

    shape: tuple[int, int, int]
    classes: int
    factor: int = 2
    axis_name: str | None = None
    frozen_modules = ("classifier",)

    @nn.compact
    def __call__(self, seen: Outputs, train: bool, mask: jax.Array | None = None) -> Outputs:
        """The outputs of the whole network, of which `seen` are those of the student alone."""
        height, width, channels = self.shape
        x = last_map(seen)
        x = adaptive_avg_pool(x, height, width) if x.shape[1] > height else x
        x = Projector(channels, self.factor, train, self.axis_name, name="projector")(x, mask)
        classifier = Linear(self.classes, name="classifier")
        return pool_and_classify(x, classifier, seen.features, seen.preact)


def last_map(outputs: Outputs) -> jax.Array:
    """The last of `features`; after the BatchNorm and ReLU that follow it in some networks."""
    tap, pre_pool = outputs.features[-1], outputs.pre_pool
    # After a convolution, the map before the pooling has another number of channels.
    return tap if pre_pool is None or pre_pool.shape != tap.shape else pre_pool


class SimKD(Term):
    """Mean squared difference of the projected map and the teacher's map, per sample.

    The projector and the teacher's classifier become the head of the student (`ReusedClassifier`),
    which makes all predictions; the student's own classifier has no part in them. If the projected
    map is the smaller one, the teacher's is averaged to its size. Agrees with the authors' code.
    The largest intermediate array is (B, H, W, D), the teacher's map.

    Attributes:
        factor: by how many times the projector's middle is narrower than the teacher's map; 2, 4 or
            8 in the paper.
    """

    factor: int = 2

    paper = "Chen et al., 2022: Knowledge distillation with the reused teacher classifier"
    teacher_taps = ("pre_pool",)
    mixed_images = True
    replaces_head = True

    @nn.nowrap
    def replacement_head(self, teacher: Outputs, axis_name: str | None) -> nn.Module:
        """The projector and the teacher's classifier; `ValueError` if they cannot be made."""
        _, height, width, channels = pre_pool_of(teacher).shape
        if not 1 <= self.factor <= channels:
            raise ValueError(
                f"the projector of simkd would be {channels} / {self.factor} channels wide; set "
                f"config.terms.simkd.factor to 1 to {channels}"
            )
        classes = classifier_of(teacher)[0].shape[1]
        return ReusedClassifier((height, width, channels), classes, self.factor, axis_name)

    @nn.nowrap
    def inherited(self, teacher: "Teacher") -> Mapping[tuple[str, ...], np.ndarray]:
        """The teacher's classifier."""
        kernel, bias = teacher.classifier()
        return {("classifier", "kernel"): kernel, ("classifier", "bias"): bias}

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` if a network lacks the map."""
        s, t = pool_to_smaller(pre_pool_of(student), pre_pool_of(teacher))
        return jnp.square(s - t).mean(axis=(1, 2, 3))
