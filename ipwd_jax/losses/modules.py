"""Trainable modules that several terms put between the student's maps and the teacher's."""

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, relu


class ConvRegressor(nn.Module):
    """A convolution, BatchNorm and ReLU that bring a map to the shape of another.

    As in `ConvReg` of RepDistiller, the heights decide which convolution it is: one of stride 2 if
    the target is half as high, a transposed one if the target is twice as high, and otherwise an
    unpadded one whose kernel is large enough to shrink the map to the target. The initialisation is
    PyTorch's default.

    Attributes:
        shape: (..., H, W, C), the shape of the target.
        axis_name: mapped axis over which batch statistics are synchronised.
        relu: whether a ReLU follows the BatchNorm.
    """

    shape: tuple[int, ...]
    axis_name: str | None = None
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, H, W, C) and mask (B,) -> (B, H', W', C').

        Raises:
            ValueError: none of these convolutions leads from one size to the other.
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
            raise ValueError(
                f"no regressor leads from maps of height {source} to height {target}; choose "
                "networks or maps where the target is at most as high or twice as high"
            )
        x = BatchNorm(train=True, axis_name=self.axis_name, name="bn")(layer(x), mask)
        return relu(x) if self.relu else x
