"""ResNeXt-29 for small images (Xie et al. 2017, https://arxiv.org/abs/1611.05431).

The network follows the ResNeXt-29 of https://github.com/lgcnsai/PS-KD-Pytorch, whose checkpoints
can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, pool_and_classify, relu


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions, a shortcut; returns the sum before the final ReLU."""

    width: int
    inside: int
    groups: int
    stride: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = conv(self.inside, kernel=1, name="conv_reduce")(x)
        y = relu(self.norm(name="bn_reduce")(y, mask))
        y = conv(self.inside, stride=self.stride, groups=self.groups, name="conv_conv")(y)
        y = relu(self.norm(name="bn")(y, mask))
        y = conv(self.width, kernel=1, name="conv_expand")(y)
        y = self.norm(name="bn_expand")(y, mask)
        if x.shape[-1] != self.width:
            name = "shortcut.shortcut_{}"
            x = conv(self.width, kernel=1, stride=self.stride, name=name.format("conv"))(x)
            x = self.norm(name=name.format("bn"))(x, mask)
        return x + y


class ResNeXt(nn.Module):
    """ResNeXt of three stages.

    Attributes:
        classes: number of logits.
        groups: number of groups of the 3x3 convolutions.
        group_width: channels per group in the first stage.
        blocks: number of blocks in each stage.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    groups: int = 8
    group_width: int = 64
    blocks: int = 3
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 4  # two halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the three stages.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = conv(64, name="conv_1_3x3")(x)
        x = relu(norm(name="bn_1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for stage in (1, 2, 3):
            for block in range(self.blocks):
                layer = GroupedBottleneck(
                    128 * 2**stage,
                    self.groups * self.group_width * 2 ** (stage - 1),
                    self.groups,
                    2 if stage > 1 and block == 0 else 1,
                    norm,
                    name=f"stage_{stage}.stage_{stage}_bottleneck_{block}",
                )
                pre = layer(x, mask)
                x = relu(pre)
            features += (x,)
            preact += (pre,)
        classifier = Linear(
            self.classes,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
            bias_init=nn.initializers.zeros,
            name="classifier",
        )
        return pool_and_classify(x, classifier, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"ResNeXt29_8x64d": ResNeXt}
