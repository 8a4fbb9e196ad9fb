"""Heo et al., 2019 (A comprehensive overhaul of feature distillation): maps before the ReLU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.stats import norm

from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch, Term, adaptive_avg_pool
from ipwd_jax.models.base import BatchNorm, Outputs, conv
from ipwd_jax.precision import at_least_float32

if TYPE_CHECKING:
    from ipwd_jax.data.base import Dataset
    from ipwd_jax.teacher import Teacher


def ofd_margin(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The mean of the negative values of a channel, taken to be normal after BatchNorm.

    This is `E[x | x < 0]` for x ~ N(bias, scale^2), or `-3 |scale|` if x is negative with a
    probability of at most 0.001. Agrees with `get_margin_from_BN` of the authors' code.

    Args:
        scale: (C,) the gammas of the BatchNorm before the ReLU.
        bias: (C,) its betas.

    Returns:
        (C,) margins, at most 0.
    """
    deviation = jnp.abs(scale)
    ratio = -bias / jnp.maximum(deviation, 1e-30)  # with scale 0, x is the bias
    tail = norm.cdf(ratio)
    rare = tail <= 0.001
    mean = bias - deviation * norm.pdf(ratio) / jnp.where(rare, 1, tail)
    return jnp.where(rare, -3 * deviation, mean)


def ofd_distance(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Partial squared distance for each sample, summed over its map.

    Where the teacher is positive, the student should equal it. Elsewhere, the student should not
    exceed the teacher or the margin, whichever is greater. Agrees with `distance` of the authors'
    code.

    Args:
        student: (B, H, W, C).
        teacher: (B, H, W, C) before its ReLU.
        margin: (C,), at most 0.

    Returns:
        (B,) distances.
    """
    target = jnp.maximum(teacher, margin.reshape(1, 1, 1, -1))
    counts = (student > target) | (target > 0)
    return jnp.where(counts, jnp.square(student - target), 0).sum(axis=(1, 2, 3))


class OFD(Term):
    """`ofd_distance` of the maps before their activation, each after a connector, per sample.

    A connector is a 1 x 1 convolution with BatchNorm that produces the teacher's channels; the
    teacher's map is average-pooled to the student's size. The deepest map has the weight 1, and
    each shallower map half the weight of the next deeper one. The largest intermediate array is
    (B, H, W, C) with the student's size and the teacher's channels.

    Attributes:
        preact_norms: (gammas, betas) of the BatchNorm before the teacher's ReLU, one pair of
            tuples for each of the teacher's maps after the stem; () stands for gammas of 1 and
            betas of 0.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    preact_norms: tuple = ()
    axis_name: str | None = None

    paper = "Heo et al., 2019: A comprehensive overhaul of feature distillation"
    teacher_taps = ("preact",)
    mixed_images = True

    @nn.nowrap
    def check(self, dataset: "Dataset", teacher: nn.Module | None) -> None:
        """Raises `UserError` if the teacher does not declare which BatchNorm feeds each map."""
        if not hasattr(teacher, "preact_norms"):
            raise UserError(
                "the term ofd needs to know which BatchNorm feeds each map of the teacher, but "
                f"{type(teacher).__name__} does not declare it (`preact_norms`); choose a resnet, "
                "a wrn or a vgg as teacher"
            )

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "OFD":
        """The term with the gammas and betas of this teacher."""
        return self.clone(preact_norms=teacher.preact_norms())

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,).

        Raises:
            ValueError: `preact_norms` does not match the teacher's maps.
        """
        maps_s, maps_t = at_least_float32((student.preact[1:], teacher.preact[1:]))
        margins = self._margins(maps_t)
        n = min(len(maps_s), len(maps_t))
        loss: jax.Array | float = 0.0
        deepest = zip(maps_s[-n:], maps_t[-n:], margins[-n:], strict=True)
        for i, (s, t, margin) in enumerate(deepest):
            s = conv(t.shape[-1], 1, name=f"connectors.{i}.0")(s)
            bn = BatchNorm(train=True, axis_name=self.axis_name, name=f"connectors.{i}.1")
            s = bn(s, batch.mask)
            t = adaptive_avg_pool(t, *s.shape[1:3])
            loss = loss / 2 + ofd_distance(s, t, margin)
        return jnp.asarray(loss)

    def _margins(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        norms = self.preact_norms or [((1.0,) * t.shape[-1], (0.0,) * t.shape[-1]) for t in maps]
        channels = [t.shape[-1] for t in maps]
        found = [(len(scale), len(bias)) for scale, bias in norms]
        if found != [(c, c) for c in channels]:
            raise ValueError(
                f"OFD needs gammas and betas for teacher maps with {channels} channels, but the "
                f"pairs in preact_norms have the lengths {found}; pass a matching pair for each map"
            )
        return [
            ofd_margin(jnp.asarray(scale, t.dtype), jnp.asarray(bias, t.dtype))
            for (scale, bias), t in zip(norms, maps, strict=True)
        ]
