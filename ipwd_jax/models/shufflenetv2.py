"""ShuffleNetV2 for small images (Ma et al. 2018, https://arxiv.org/abs/1807.11164).

The networks follow `models/ShuffleNetv2.py` of https://github.com/HobbitLong/RepDistiller, whose
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
    channel_shuffle,
    pool_and_classify,
    relu,
)


class DownUnit(nn.Module):
    """Two branches that both halve the map, and whose channels are then shuffled."""

    width: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        half, channels = self.width // 2, x.shape[-1]
        left = Conv(channels, stride=2, groups=channels, name="conv1")(x)
        left = self.norm(name="bn1")(left, mask)
        left = Conv(half, kernel=1, name="conv2")(left)
        left = relu(self.norm(name="bn2")(left, mask))
        right = Conv(half, kernel=1, name="conv3")(x)
        right = relu(self.norm(name="bn3")(right, mask))
        right = Conv(half, stride=2, groups=half, name="conv4")(right)
        right = self.norm(name="bn4")(right, mask)
        right = Conv(half, kernel=1, name="conv5")(right)
        right = relu(self.norm(name="bn5")(right, mask))
        return channel_shuffle(jnp.concatenate([left, right], axis=-1), 2)


class BasicUnit(nn.Module):
    """Passes half of the channels through unchanged, the other half through three convolutions.

    Returns:
        The shuffled output, and the output before the last ReLU, which, as in the reference, is
        also before the shuffle.
    """

    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        untouched, y = jnp.split(x, 2, axis=-1)
        half = y.shape[-1]
        y = Conv(half, kernel=1, name="conv1")(y)
        y = relu(self.norm(name="bn1")(y, mask))
        y = Conv(half, groups=half, name="conv2")(y)
        y = self.norm(name="bn2")(y, mask)
        y = Conv(half, kernel=1, name="conv3")(y)
        y = self.norm(name="bn3")(y, mask)
        pre = jnp.concatenate([untouched, y], axis=-1)
        out = jnp.concatenate([untouched, relu(y)], axis=-1)
        return channel_shuffle(out, 2), pre


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 with a 1x1 stem and no pooling before the stages.

    Attributes:
        widths: channels of the three stages and of the last convolution.
        classes: number of logits.
        units: number of units in each stage, in addition to the one that halves the map.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    widths: tuple[int, int, int, int]
    classes: int
    units: tuple[int, int, int] = (3, 7, 3)
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("conv2", "bn2", "linear")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the three stages.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        *stages, last = self.widths
        x = Conv(24, kernel=1, name="conv1")(x)
        x = relu(norm(name="bn1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for stage, (width, units) in enumerate(zip(stages, self.units, strict=True), start=1):
            x = DownUnit(width, norm, name=f"layer{stage}.0")(x, mask)
            for unit in range(1, units + 1):
                x, pre = BasicUnit(norm, name=f"layer{stage}.{unit}")(x, mask)
            features += (x,)
            preact += (pre,)
        x = Conv(last, kernel=1, name="conv2")(x)
        x = relu(norm(name="bn2")(x, mask))
        linear = Linear(self.classes, name="linear")
        return pool_and_classify(x, linear, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ShuffleV2": partial(ShuffleNetV2, widths=(116, 232, 464, 1024)),
    "ShuffleV2_0.2": partial(ShuffleNetV2, widths=(40, 80, 160, 512), units=(3, 3, 3)),
    "ShuffleV2_0.3": partial(ShuffleNetV2, widths=(40, 80, 160, 512)),
    "ShuffleV2_0.5": partial(ShuffleNetV2, widths=(48, 96, 192, 1024)),
    "ShuffleV2_1.5": partial(ShuffleNetV2, widths=(176, 352, 704, 1024)),
    # The second stage has 488 channels, both in the paper and in the reference.
    "ShuffleV2_2": partial(ShuffleNetV2, widths=(224, 488, 976, 2048)),
}
