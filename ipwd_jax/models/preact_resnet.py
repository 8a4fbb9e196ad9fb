"""Pre-activation ResNet-18 for small images (He et al. 2016, https://arxiv.org/abs/1603.05027).

The network follows the ResNet-18 of https://github.com/lgcnsai/PS-KD-Pytorch, whose checkpoints can
be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, pool_and_classify, relu


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut.

    As in the reference, the shortcut starts from the activated input even if it is the identity.

    Returns:
        The raw sum, and the output of the first BatchNorm (`x` normalised, before the ReLU).
    """

    width: int
    stride: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        pre = self.norm(name="bn1")(x, mask)
        activated = relu(pre)
        y = Conv(self.width, stride=self.stride, name="conv1")(activated)
        y = relu(self.norm(name="bn2")(y, mask))
        y = Conv(self.width, name="conv2")(y)
        if self.stride != 1 or x.shape[-1] != self.width:
            shortcut = Conv(self.width, kernel=1, stride=self.stride, name="shortcut.0")
            activated = shortcut(activated)
        return activated + y, pre


class PreactResNet(nn.Module):
    """Pre-activation ResNet of four stages.

    As in the reference, the stem ends with BatchNorm and ReLU, and there is no BatchNorm or ReLU
    between the last sum and the pooling.

    Attributes:
        classes: number of logits.
        blocks: number of blocks in each stage.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("linear",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the output of the stem and the raw sums of the four stages. The `preact` of a
        stage is the output of the BatchNorm that reads its sum, which is the first one of the next
        stage; the last stage's `preact` is the sum itself.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = Conv(64, name="conv1")(x)
        x = relu(norm(name="bn1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer = PreactBlock(32 * 2**stage, stride, norm, name=f"layer{stage}.{block}")
                x, pre = layer(x, mask)
                if stage > 1 and block == 0:
                    preact += (pre,)
            features += (x,)
        preact += (x,)
        linear = Linear(self.classes, name="linear")
        return pool_and_classify(x, linear, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"PreActResNet18": PreactResNet}
