"""Trainable parts that several terms put between the student's maps and the teacher's."""

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, relu


class ConvRegressor(nn.Module):
    """A convolution, BatchNorm and ReLU that bring a map to the shape of another.

    After `ConvReg` of RepDistiller: a stride-2 convolution where the target is half as large, a
    transposed one where it is twice as large, an unpadded one that crops otherwise. PyTorch's
    default initialisation. The heights decide, as there.

    Attributes:
        shape: (..., H, W, C) of the target.
        axis_name: mapped axis whose devices share batch statistics.
        relu: whether a ReLU ends it.
    """

    shape: tuple[int, ...]
    axis_name: str | None = None
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, H, W, C) and mask (B,) -> (B, H', W', C').

        Raises:
            ValueError: no such convolution leads from one size to the other.
        """
        source, (target, _, channels) = x.shape[1], self.shape[-3:]
        if source == 2 * target:
            layer = Conv(channels, 3, stride=2, use_bias=True, name="conv")
        elif 2 * source == target:
            layer = Conv(
                channels, 4, stride=2, padding=1, use_bias=True, transpose=True, name="conv"
            )
        elif source >= target:
            layer = Conv(channels, 1 + source - target, padding=0, use_bias=True, name="conv")
        else:
            raise ValueError(f"no regressor from maps of height {source} to {target}")
        x = BatchNorm(train=True, axis_name=self.axis_name, name="bn")(layer(x), mask)
        return relu(x) if self.relu else x
