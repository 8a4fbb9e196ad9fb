"""ResNets of four stages (He et al. 2016, https://arxiv.org/abs/1512.03385, table 1).

The networks for small images follow `models/resnetv2.py` of
https://github.com/HobbitLong/RepDistiller, and those for large images follow torchvision. The
checkpoints of both can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn
from jax.nn.initializers import Initializer

from ipwd_jax.models.base import (
    BatchNorm,
    Conv,
    Linear,
    Outputs,
    he_normal_fan_out,
    max_pool,
    pool_and_classify,
    relu,
    torch_uniform_kernel,
)
from ipwd_jax.models.resnet import BasicBlock


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; returns the sum before the final ReLU.

    The stride is that of the 3x3 convolution. The output has four times `width` channels.
    """

    width: int
    stride: int
    conv: Callable[..., Conv]
    norm: Callable[..., BatchNorm]
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        out = 4 * self.width
        y = self.conv(self.width, kernel=1, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y, mask))
        y = self.conv(self.width, stride=self.stride, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y, mask))
        y = self.conv(out, kernel=1, name="conv3")(y)
        y = self.norm(name="bn3")(y, mask)
        if self.stride != 1 or x.shape[-1] != out:
            x = self.conv(out, kernel=1, stride=self.stride, name=f"{self.shortcut}.0")(x)
            x = self.norm(name=f"{self.shortcut}.1")(x, mask)
        return x + y


class LargeResNet(nn.Module):
    """ResNet of four stages for small images, with a 3x3 stem that keeps their size.

    Attributes:
        block: `BasicBlock` or `Bottleneck`.
        blocks: number of blocks in each stage.
        classes: number of logits.
        kernel_init: initialiser of the convolutions.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    block: Callable[..., nn.Module]
    blocks: tuple[int, int, int, int]
    classes: int
    kernel_init: Initializer = he_normal_fan_out
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("linear",)
    draws_classifier_as_convolution: ClassVar[bool] = True
    shortcut: ClassVar[str] = "shortcut"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the four stages.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        conv = partial(Conv, kernel_init=self.kernel_init)
        x = self.stem(x, conv)
        x = relu(norm(name="bn1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        x = self.after_stem(x)
        for stage, blocks in enumerate(self.blocks, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                width, name = 32 * 2**stage, f"layer{stage}.{block}"
                layer = self.block(width, stride, conv, norm, self.shortcut, name=name)
                pre = layer(x, mask)
                x = relu(pre)
            features += (x,)
            preact += (pre,)
        classifier = Linear(self.classes, name=self.head_modules[0])
        return pool_and_classify(x, classifier, features, preact)

    def preact_norms(self) -> list[tuple[str, ...]]:
        """Paths of the residual branches' last BatchNorm, one per `preact` after the stem."""
        last = "bn3" if self.block is Bottleneck else "bn2"
        return [(f"layer{stage}.{n - 1}", last) for stage, n in enumerate(self.blocks, start=1)]

    def stem(self, x: jax.Array, conv: Callable[..., Conv]) -> jax.Array:
        """Apply the first convolution."""
        return conv(64, name="conv1")(x)

    def after_stem(self, x: jax.Array) -> jax.Array:
        """Apply what lies between the tap of the stem and the first stage."""
        return x


class ImageNetResNet(LargeResNet):
    """ResNet of four stages for large images, with a 7x7 stem and a pooling that halve the map."""

    smallest_image: ClassVar[int] = 32  # five halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("fc",)
    shortcut: ClassVar[str] = "downsample"

    def stem(self, x: jax.Array, conv: Callable[..., Conv]) -> jax.Array:
        return conv(64, kernel=7, stride=2, name="conv1")(x)

    def after_stem(self, x: jax.Array) -> jax.Array:
        return max_pool(x, 3, stride=2, padding=1)


_DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"ResNet{d}": partial(LargeResNet, block=b, blocks=n) for d, (b, n) in _DEPTHS.items()},
    # PS-KD trains this one with PyTorch's default initialisation.
    "ResNet101": partial(
        LargeResNet, block=Bottleneck, blocks=(3, 4, 23, 3), kernel_init=torch_uniform_kernel
    ),
    **{
        f"ResNet{d}_imagenet": partial(ImageNetResNet, block=b, blocks=n)
        for d, (b, n) in _DEPTHS.items()
    },
}
