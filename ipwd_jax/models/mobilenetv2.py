"""MobileNetV2 for small images (Sandler et al. 2018, https://arxiv.org/abs/1801.04381).

The networks follow `models/mobilenetv2.py` of https://github.com/HobbitLong/RepDistiller, whose
checkpoints can be imported.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.errors import UserError
from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, pool_and_classify, relu

# Expansion, channels at width 1, number of blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_TAPPED = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """An expanding 1x1, a depthwise 3x3 and a projecting 1x1 convolution; the output is linear.

    As in the reference, the expanding convolution is present even if it expands by 1, and the
    activations are plain ReLUs.
    """

    width: int
    stride: int
    expansion: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        inside = x.shape[-1] * self.expansion
        y = conv(inside, kernel=1, name="conv.0")(x)
        y = relu(self.norm(name="conv.1")(y, mask))
        y = conv(inside, stride=self.stride, groups=inside, name="conv.3")(y)
        y = relu(self.norm(name="conv.4")(y, mask))
        y = conv(self.width, kernel=1, name="conv.6")(y)
        y = self.norm(name="conv.7")(y, mask)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
    """MobileNetV2 whose stem halves the map and whose third stage does not.

    Attributes:
        classes: number of logits.
        width: factor by which the channels of the stages are multiplied.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    width: float = 0.5
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 16  # four halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("conv2.0", "conv2.1", "classifier.0")
    draws_classifier_as_convolution: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the output of the stem and the linear outputs of four stages, so that
        `preact` equals `features`.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = conv(int(32 * self.width), stride=2, name="conv1.0")(x)
        x = relu(norm(name="conv1.1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        for stage, (expansion, channels, repeats, stride) in enumerate(_STAGES):
            for block in range(repeats):
                layer = InvertedResidual(
                    int(channels * self.width),
                    stride if block == 0 else 1,
                    expansion,
                    norm,
                    name=f"blocks.{stage}.{block}",
                )
                x = layer(x, mask)
            if stage in _TAPPED:
                features += (x,)
        x = conv(int(1280 * max(self.width, 1.0)), kernel=1, name="conv2.0")(x)
        x = relu(norm(name="conv2.1")(x, mask))
        small = nn.initializers.normal(0.01)
        classifier = Linear(
            self.classes, kernel_init=small, bias_init=nn.initializers.zeros, name="classifier.0"
        )
        return pool_and_classify(x, classifier, features, features)


def from_name(name: str) -> Callable[..., nn.Module] | None:
    """The constructor for a name `MobileNetV2_<width>`; None if the name has another form.

    Raises:
        UserError: the width leaves a stage without channels.
    """
    match = re.fullmatch(r"MobileNetV2_(\d+\.\d+)", name)
    if match is None:
        return None
    if int(16 * float(match[1])) < 1:
        raise UserError(
            f"no network {name!r}: in MobileNetV2_<width> the width must be at least 0.0625, which "
            "leaves the narrowest stage one channel"
        )
    return partial(MobileNetV2, width=float(match[1]))


# The published tables use half the width; `from_name` constructs all other widths.
NETWORKS: dict[str, Callable[..., nn.Module]] = {"MobileNetV2": MobileNetV2}
