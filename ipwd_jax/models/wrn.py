"""Wide residual networks (Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146).

The networks follow `models/wrn.py` of https://github.com/HobbitLong/RepDistiller, whose checkpoints
can be imported.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.errors import UserError
from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, pool_and_classify, relu


class PreactBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut.

    As in the reference, and unlike in a ResNet's block, the projection of the shortcut reads the
    activated input instead of `x`, and only a change of width, not the stride, makes one necessary.

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
        y = conv(self.width, stride=self.stride, name="conv1")(activated)
        y = relu(self.norm(name="bn2")(y, mask))
        y = conv(self.width, name="conv2")(y)
        if x.shape[-1] != self.width:
            x = conv(self.width, kernel=1, stride=self.stride, name="convShortcut")(activated)
        return x + y, pre


class WideResNet(nn.Module):
    """WRN of depth 6 * blocks + 4, without dropout.

    Attributes:
        blocks: number of blocks in each group.
        width: factor on the channels 16, 32 and 64 of the three groups (the stem keeps 16).
        classes: number of logits.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    blocks: int
    width: int
    classes: int
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 4  # two halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("bn1", "fc")
    draws_classifier_as_convolution: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the output of the stem's convolution and the raw sum of each group. The
        `preact` of a group is the output of the BatchNorm that reads its sum, which is the first
        one of the next group or the final one. The reference evaluates that layer a second time for
        the tap, and so updates its running statistics twice per step; here they are updated once.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = conv(16, name="conv1")(x)
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for group in (1, 2, 3):
            for block in range(self.blocks):
                stride = 2 if group > 1 and block == 0 else 1
                layer = PreactBlock(
                    8 * 2**group * self.width, stride, norm, name=f"block{group}.layer.{block}"
                )
                x, pre = layer(x, mask)
                if group > 1 and block == 0:
                    preact += (pre,)
            features += (x,)
        pre = norm(name="bn1")(x, mask)
        preact += (pre,)
        fc = Linear(self.classes, bias_init=nn.initializers.zeros, name="fc")
        return pool_and_classify(relu(pre), fc, features, preact)

    def preact_norms(self) -> list[tuple[str, ...]]:
        """Paths of the BatchNorm layers whose outputs are the `preact` after the stem."""
        return [("block2.layer.0", "bn1"), ("block3.layer.0", "bn1"), ("bn1",)]


def from_name(name: str) -> Callable[..., nn.Module] | None:
    """The constructor for a name `wrn_<depth>_<width>`; None if the name has another form.

    Raises:
        UserError: there is no such network, because the depth is not possible or the width is 0.
    """
    match = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
    if match is None:
        return None
    depth, width = map(int, match.groups())
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or width < 1:
        near = f"wrn_{4 + 6 * max(1, round((depth - 4) / 6))}_{max(1, width)}"
        raise UserError(
            f"no network {name!r}: in wrn_<depth>_<width> the depth is 6 n + 4 "
            f"(10, 16, 22, 28, 34, 40, ...) and the width at least 1. Nearest: {near!r}."
        )
    return partial(WideResNet, blocks=blocks, width=width)


# The networks of the published tables, for lists and hints; `from_name` constructs all others.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f"wrn_{6 * n + 4}_{width}": partial(WideResNet, blocks=n, width=width)
    for n in (2, 6)
    for width in (1, 2)
}
