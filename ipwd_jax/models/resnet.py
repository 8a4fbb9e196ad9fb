"""ResNets for small images (He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2).

The networks follow `models/resnet.py` of https://github.com/HobbitLong/RepDistiller, whose
checkpoints can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, conv, pool_and_classify, relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; returns the sum before the final ReLU."""

    width: int
    stride: int
    conv: Callable[..., Conv]
    norm: Callable[..., BatchNorm]
    shortcut: str = "downsample"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.conv(self.width, stride=self.stride, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y, mask))
        y = self.conv(self.width, name="conv2")(y)
        y = self.norm(name="bn2")(y, mask)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self.conv(self.width, kernel=1, stride=self.stride, name=f"{self.shortcut}.0")(x)
            x = self.norm(name=f"{self.shortcut}.1")(x, mask)
        return x + y


class ResNet(nn.Module):
    """ResNet of depth 6 * blocks + 2: a stem and three stages, two of which halve the map.

    Attributes:
        blocks: number of blocks in each stage.
        classes: number of logits.
        widths: channels of the stem and of the three stages.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    blocks: int
    classes: int
    widths: tuple[int, int, int, int] = (16, 16, 32, 64)
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 4  # two halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("fc",)
    draws_classifier_as_convolution: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the three stages.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        stem, *stages = self.widths
        x = conv(stem, name="conv1")(x)
        x = relu(norm(name="bn1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for stage, width in enumerate(stages, start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                pre = BasicBlock(width, stride, conv, norm, name=f"layer{stage}.{block}")(x, mask)
                x = relu(pre)
            features += (x,)
            preact += (pre,)
        fc = Linear(self.classes, name="fc")
        return pool_and_classify(x, fc, features, preact)

    def preact_norms(self) -> list[tuple[str, ...]]:
        """Paths of the residual branches' last BatchNorm, one per `preact` after the stem."""
        return [(f"layer{stage}.{self.blocks - 1}", "bn2") for stage in (1, 2, 3)]


# The stem of the x4 networks has 32 channels, not 64, as in every published x4 checkpoint and
# parameter count.
_X4 = (32, 64, 128, 256)

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{6 * n + 2}": partial(ResNet, blocks=n) for n in (1, 2, 3, 5, 7, 9, 18)},
    **{f"resnet{6 * n + 2}x4": partial(ResNet, blocks=n, widths=_X4) for n in (1, 5)},
}
