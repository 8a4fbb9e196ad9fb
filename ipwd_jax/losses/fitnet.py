"""Romero et al., 2015 (FitNets): one map of the teacher as a hint."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.modules import ConvRegressor
from ipwd_jax.models.base import Outputs


def hint_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of two maps (B, H, W, C) of each sample: (B,).

    Agrees with `HintLoss` of RepDistiller.
    """
    return jnp.square(student - teacher).mean(axis=(1, 2, 3))


class FitNet(Term):
    """`hint_loss` of the student's map, brought to the teacher's shape, and that map, per sample.

    The regressor is trained along with the student, as in RepDistiller; the paper has a first
    stage for it. Largest intermediate: (B, H, W, C) of the teacher's map.

    Attributes:
        layer: which of `features`, the stem being 0; 2 in RepDistiller.
        axis_name: mapped axis whose devices share batch statistics.
    """

    layer: int = 2
    axis_name: str | None = None

    paper = "Romero et al., 2015: FitNets"
    teacher_taps = ("features",)

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """(B,) loss. Raises `ValueError` where one of the two networks has no such map."""
        maps = min(len(student.features), len(teacher.features))
        if not -maps <= self.layer < maps:
            raise ValueError(
                f"config.terms.fitnet.layer is {self.layer}, but student and teacher have the maps "
                f"0 to {maps - 1} in common; choose one of them"
            )
        s, t = (
            x.astype(jnp.promote_types(x.dtype, jnp.float32))
            for x in (student.features[self.layer], teacher.features[self.layer])
        )
        regressor = ConvRegressor(t.shape, self.axis_name, name="regressor")
        return hint_loss(regressor(s, batch.mask), t)
