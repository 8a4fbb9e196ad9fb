"""Heo et al., 2019 (A comprehensive overhaul of feature distillation): maps before the ReLU."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.scipy.stats import norm

from ipwd_jax.losses.base import Batch, Term, adaptive_avg_pool
from ipwd_jax.models.base import BatchNorm, Outputs, conv

if TYPE_CHECKING:
    from ipwd_jax.teacher import Teacher


def ofd_margin(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """The mean of the negative part of a channel that BatchNorm made normal.

    `E[x | x < 0]` for x ~ N(bias, scale^2), and `-3 |scale|` where x is negative with a
    probability of at most 0.001. Agrees with `get_margin_from_BN` of the authors' code.

    Args:
        scale: (C,) the gammas of the BatchNorm before the ReLU.
        bias: (C,) its betas.

    Returns:
        (C,) margins, none above 0.
    """
    deviation = jnp.abs(scale)
    ratio = -bias / jnp.maximum(deviation, 1e-30)  # a channel without spread is its bias
    tail = norm.cdf(ratio)
    rare = tail <= 0.001
    mean = bias - deviation * norm.pdf(ratio) / jnp.where(rare, 1, tail)
    return jnp.where(rare, -3 * deviation, mean)


def ofd_distance(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Partial squared distance of each sample, summed over its map.

    Where the teacher is positive the student shall equal it; where it is not, the student shall
    stay below it, or below the margin where the teacher is lower still. Agrees with `distance` of
    the authors' code.

    Args:
        student: (B, H, W, C).
        teacher: (B, H, W, C) before its ReLU.
        margin: (C,), none above 0.

    Returns:
        (B,) distances.
    """
    target = jnp.maximum(teacher, margin.reshape(1, 1, 1, -1))
    counts = (student > target) | (target > 0)
    return jnp.where(counts, jnp.square(student - target), 0).sum(axis=(1, 2, 3))


class OFD(Term):
    """`ofd_distance` of the maps before their activation, after a connector each, per sample.

    A connector is a 1 x 1 convolution and BatchNorm to the teacher's channels; the teacher's map
    is average-pooled to the student's size. The deepest map weighs 1, each shallower one half of
    the next. Largest intermediate: (B, H, W, C) with the student's size and the teacher's channels.

    Attributes:
        preact_norms: (gammas, betas) of the BatchNorm before the teacher's ReLU, one pair of
            tuples for each of the teacher's maps after the stem; (): gammas 1 and betas 0.
        axis_name: mapped axis whose devices share batch statistics.
    """

    preact_norms: tuple = ()
    axis_name: str | None = None

    paper = "Heo et al., 2019: A comprehensive overhaul of feature distillation"
    teacher_taps = ("preact",)

    @nn.nowrap
    def of_teacher(self, teacher: "Teacher") -> "OFD":
        """The term with the gammas and betas of the teacher's maps."""
        return self.clone(preact_norms=teacher.preact_norms())

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """Outputs and batch -> (B,).

        Raises:
            ValueError: `preact_norms` does not fit the teacher's maps.
        """
        maps_s, maps_t = _wide(student.preact[1:]), _wide(teacher.preact[1:])
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

    def _margins(self, maps: list[jax.Array]) -> list[jax.Array]:
        norms = self.preact_norms or [((1.0,) * t.shape[-1], (0.0,) * t.shape[-1]) for t in maps]
        channels = [t.shape[-1] for t in maps]
        found = [(len(scale), len(bias)) for scale, bias in norms]
        if found != [(c, c) for c in channels]:
            raise ValueError(
                f"OFD needs the gammas and betas of {channels} channels of the teacher's maps, but"
                f" preact_norms has {found}"
            )
        return [
            ofd_margin(jnp.asarray(scale, t.dtype), jnp.asarray(bias, t.dtype))
            for (scale, bias), t in zip(norms, maps, strict=True)
        ]


def _wide(maps: Sequence[jax.Array]) -> list[jax.Array]:
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in maps]
