"""DenseNet-121 for small images (Huang et al. 2017, https://arxiv.org/abs/1608.06993).

The network follows the DenseNet-121 of https://github.com/lgcnsai/PS-KD-Pytorch, whose checkpoints
can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, avg_pool, pool_and_classify, relu


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after BatchNorm and ReLU.

    The new channels are concatenated in front of those of the input.
    """

    growth: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = relu(self.norm(name="bn1")(x, mask))
        y = Conv(4 * self.growth, kernel=1, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y, mask))
        y = Conv(self.growth, name="conv2")(y)
        return jnp.concatenate([y, x], axis=-1)


class DenseNet(nn.Module):
    """DenseNet with bottlenecks, and with transitions that halve both the channels and the map.

    Attributes:
        classes: number of logits.
        layers: number of layers in each dense block.
        growth: number of channels that each layer adds.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    layers: tuple[int, int, int, int] = (6, 12, 24, 16)
    growth: int = 32
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("bn", "linear")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the output of the stem's convolution and the raw output of each dense block.
        The `preact` of a dense block is the output of the BatchNorm that reads the block, which is
        that of a transition or the final one.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = Conv(2 * self.growth, name="conv1")(x)
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for block, layers in enumerate(self.layers, start=1):
            if block > 1:
                pre = norm(name=f"trans{block - 1}.bn")(x, mask)
                preact += (pre,)
                transition = Conv(x.shape[-1] // 2, kernel=1, name=f"trans{block - 1}.conv")
                x = avg_pool(transition(relu(pre)), 2)
            for layer in range(layers):
                x = DenseLayer(self.growth, norm, name=f"dense{block}.{layer}")(x, mask)
            features += (x,)
        pre = norm(name="bn")(x, mask)
        preact += (pre,)
        linear = Linear(self.classes, name="linear")
        return pool_and_classify(relu(pre), linear, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"DenseNet121": DenseNet}
