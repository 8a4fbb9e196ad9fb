"""ShuffleNetV1 for small images (Zhang et al. 2018, https://arxiv.org/abs/1707.01083).

The network follows `models/ShuffleNetv1.py` of https://github.com/HobbitLong/RepDistiller, whose
checkpoints can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.models.base import (
    BatchNorm,
    Conv,
    Linear,
    Outputs,
    avg_pool,
    channel_shuffle,
    pool_and_classify,
    relu,
)


class Unit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; returns the sum or the concatenation.

    As in the reference and unlike in the paper, a ReLU follows the depthwise convolution. The unit
    that reads the 24 channels of the stem does not group its first 1x1 convolution. The caller
    applies the ReLU that follows the unit. A strided unit concatenates its convolutions' output and
    its input, average-pooled with zero padding, so its convolutions produce fewer channels.
    """

    width: int
    stride: int
    groups: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        out = self.width - x.shape[-1] if self.stride == 2 else self.width
        inside, groups = out // 4, 1 if x.shape[-1] == 24 else self.groups
        y = Conv(inside, kernel=1, groups=groups, name="conv1")(x)
        y = channel_shuffle(relu(self.norm(name="bn1")(y, mask)), groups)
        y = Conv(inside, stride=self.stride, groups=inside, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y, mask))
        y = Conv(out, kernel=1, groups=self.groups, name="conv3")(y)
        y = self.norm(name="bn3")(y, mask)
        if self.stride == 2:
            return jnp.concatenate([y, avg_pool(x, 3, stride=2, padding=1)], axis=-1)
        return y + x


class ShuffleNetV1(nn.Module):
    """ShuffleNetV1 with three groups, a 1x1 stem and no pooling before the stages.

    Attributes:
        classes: number of logits.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("linear",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the three stages.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = Conv(24, kernel=1, name="conv1")(x)
        x = relu(norm(name="bn1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for stage, (width, units) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
            for unit in range(units):
                layer = Unit(width, 1 if unit else 2, 3, norm, name=f"layer{stage}.{unit}")
                pre = layer(x, mask)
                x = relu(pre)
            features += (x,)
            preact += (pre,)
        linear = Linear(self.classes, name="linear")
        return pool_and_classify(x, linear, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"ShuffleV1": ShuffleNetV1}
