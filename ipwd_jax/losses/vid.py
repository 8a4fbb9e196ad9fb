"""Ahn et al., 2019 (Variational information distillation): predict the teacher's maps."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, pool_to_smaller, sum_losses
from ipwd_jax.models.base import Conv, Outputs, relu
from ipwd_jax.precision import at_least_float32

_MIN_VARIANCE = 1e-5


class Variational(nn.Module):
    """A Gaussian over the teacher's map, whose mean is computed from the student's map.

    Three 1 x 1 convolutions compute the mean. The variance is one trained number per channel,
    `softplus(log_scale) + 1e-5`.

    Attributes:
        variance: initial value of the variance.
    """

    variance: float = 5.0

    @nn.compact
    def __call__(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """The mean negative log-likelihood of each sample, without its constant.

        The larger map is first average-pooled to the size of the smaller one. Agrees with `VIDLoss`
        of RepDistiller.

        Args:
            student: (B, H, W, C).
            teacher: (B, H', W', C').

        Returns:
            (B,) loss, in float32 or better.

        Raises:
            ValueError: `variance` is not above 1e-5.
        """
        mean, target = pool_to_smaller(*at_least_float32((student, teacher)))
        channels = target.shape[-1]
        for i in (0, 2, 4):
            mean = Conv(channels, 1, name=f"regressor.{i}")(relu(mean) if i else mean)
        start = _inverse_softplus(self.variance - _MIN_VARIANCE)
        log_scale = self.param(
            "log_scale", nn.initializers.constant(start), (channels,), jnp.float32
        )
        variance = (nn.softplus(log_scale) + _MIN_VARIANCE).reshape(1, 1, 1, -1)
        nll = (jnp.square(mean - target) / variance + jnp.log(variance)) / 2
        return nll.mean(axis=(1, 2, 3))


def _inverse_softplus(variance: float) -> float:
    if variance <= 0:
        raise ValueError(
            f"config.terms.vid.variance must be above {_MIN_VARIANCE}, which is added to "
            f"every variance; found {variance + _MIN_VARIANCE:.6g}"
        )
    # Above 40 the two agree to the last bit, and for large values the exponential would overflow.
    return math.log(math.expm1(variance)) if variance < 40 else variance


class VID(Term):
    """`Variational` of each map after the stem, summed over the maps, per sample.

    The largest intermediate array is (B, H, W, C), the teacher's largest map after pooling.

    Attributes:
        variance: initial value of the variances; 5 in RepDistiller.
    """

    variance: float = 5.0

    paper = "Ahn et al., 2019: Variational information distillation"
    teacher_taps = ("features",)
    mixed_images = True

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pairs = zip(student.features[1:], teacher.features[1:], strict=False)
        return sum_losses(
            Variational(self.variance, name=str(i))(s, t) for i, (s, t) in enumerate(pairs)
        )
