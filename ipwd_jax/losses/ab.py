"""Heo et al., 2019 (Knowledge transfer via activation boundaries): match which neurons fire."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.modules import ConvRegressor
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def ab_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], margin: float = 1.0
) -> jax.Array:
    """How far the student's neurons are from the teacher's side of zero, for each sample.

    If a neuron is active in the teacher, the student pays `(s - margin)^2` for a value s below
    `margin`; if it is inactive, the student pays `(s + margin)^2` for a value above `-margin`. The
    costs are summed over each map. The deepest map has the weight 3 / 1000, and each shallower map
    half the weight of the next deeper one. Agrees with `ABLoss` of RepDistiller.

    Args:
        student: maps (B, H, W, C) before their activation, from shallow to deep.
        teacher: maps of the same shapes.
        margin: distance from zero beyond which a neuron costs nothing; above 0.

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
    """`ab_loss` of the maps before their activation, each after a connector, per sample.

    A connector is a convolution with BatchNorm that produces the shape of the teacher's map; there
    is none where channels and height already agree. The loss is meant for a first stage, with no
    distillation in the main stage. The largest intermediate array is (B, H, W, C), the teacher's
    largest map.

    Attributes:
        margin: distance from zero beyond which a neuron costs nothing.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    margin: float = 1.0
    axis_name: str | None = None

    paper = "Heo et al., 2019: Knowledge transfer via activation boundaries"
    teacher_taps = ("preact",)
    mixed_images = True

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pairs = list(zip(student.preact[1:], teacher.preact[1:], strict=False))
        fitted = []
        for i, (s, t) in enumerate(pairs):
            s = at_least_float32(s)
            if (s.shape[1], s.shape[3]) != (t.shape[1], t.shape[3]):
                connector = ConvRegressor(
                    t.shape, self.axis_name, relu=False, name=f"connectors.{i}"
                )
                s = connector(s, batch.mask)
            fitted.append(s)
        return ab_loss(fitted, [t for _, t in pairs], self.margin)
