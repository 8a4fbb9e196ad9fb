"""Romero et al., 2015 (FitNets): one of the teacher's maps serves as a hint."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term
from ipwd_jax.losses.modules import ConvRegressor
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def hint_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference between two maps (B, H, W, C) for each sample: (B,).

    Agrees with `HintLoss` of RepDistiller.
    """
    return jnp.square(student - teacher).mean(axis=(1, 2, 3))


class FitNet(Term):
    """`hint_loss` between the teacher's map and the regressed map of the student, per sample.

    The regressor brings the student's map to the shape of the teacher's. It is trained together
    with the student, as in RepDistiller; the paper trains it in a first stage. The largest
    intermediate array is (B, H, W, C), the teacher's map.

    Attributes:
        layer: index into `features`, where 0 is the stem; 2 in RepDistiller.
        axis_name: mapped axis over which batch statistics are synchronised.
    """

    layer: int = 2
    axis_name: str | None = None

    paper = "Romero et al., 2015: FitNets"
    teacher_taps = ("features",)
    mixed_images = True

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` if there is no such map or the maps do not fit."""
        maps = min(len(student.features), len(teacher.features))
        if not -maps <= self.layer < maps:
            raise ValueError(
                f"config.terms.fitnet.layer is {self.layer}, but student and teacher only have the "
                f"maps 0 to {maps - 1} in common; choose one of these"
            )
        s, t = at_least_float32((student.features[self.layer], teacher.features[self.layer]))
        fitted = ConvRegressor(t.shape, self.axis_name, name="regressor")(s, batch.mask)
        if fitted.shape != t.shape:
            found, wanted = (" x ".join(map(str, x.shape[1:3])) for x in (fitted, t))
            raise ValueError(
                f"the regressor of fitnet makes maps of {found} pixels of the student's, but the "
                f"teacher's have {wanted}; choose another config.terms.fitnet.layer, or square "
                "images"
            )
        return hint_loss(fitted, t)
