"""Heo et al., 2019 (Knowledge transfer via activation boundaries): the same neurons fire."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.modules import ConvRegressor
from ipwd_jax.models.base import Outputs


def ab_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], margin: float = 1.0
) -> jax.Array:
    """How far the student's neurons are from the teacher's side of zero, of each sample.

    A neuron that is active in the teacher costs `(s - margin)^2` below `margin`, one that is not
    `(s + margin)^2` above `-margin`. Sums over a map; the deepest map weighs 3 / 1000, each
    shallower one half of the next. Agrees with `ABLoss` of RepDistiller.

    Args:
        student: maps (B, H, W, C) before their activation, shallow to deep.
        teacher: maps of the same shapes.
        margin: above 0.

    Returns:
        (B,) loss.
    """
    loss: jax.Array | float = 0.0
    for s, t in zip(student, teacher, strict=True):
        too_low = jnp.where((t > 0) & (s <= margin), jnp.square(s - margin), 0)
        too_high = jnp.where((t <= 0) & (s > -margin), jnp.square(s + margin), 0)
        loss = loss / 2 + (too_low + too_high).sum(axis=(1, 2, 3))
    return jnp.asarray(loss * 3 / 1000)


class AB(Term):
    """`ab_loss` of the maps before their activation, after a connector each, per sample.

    A connector is a convolution and BatchNorm to the shape of the teacher's map, or nothing where
    channels and height agree. A loss of a first stage, without distillation in the main one.
    Largest intermediate: (B, H, W, C) of the teacher's largest map.

    Attributes:
        margin: how far beyond zero a neuron must be to cost nothing.
        axis_name: mapped axis whose devices share batch statistics.
    """

    margin: float = 1.0
    axis_name: str | None = None

    paper = "Heo et al., 2019: Knowledge transfer via activation boundaries"
    teacher_taps = ("preact",)

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pairs = list(zip(student.preact[1:], teacher.preact[1:], strict=False))
        fitted = []
        for i, (s, t) in enumerate(pairs):
            s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
            if (s.shape[1], s.shape[3]) != (t.shape[1], t.shape[3]):
                connector = ConvRegressor(
                    t.shape, self.axis_name, relu=False, name=f"connectors.{i}"
                )
                s = connector(s, batch.mask)
            fitted.append(s)
        return ab_loss(fitted, [t for _, t in pairs], self.margin)
