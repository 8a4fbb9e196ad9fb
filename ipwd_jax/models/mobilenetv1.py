"""MobileNetV1 (Howard et al. 2017, https://arxiv.org/abs/1704.04861).

The network follows `models/mobilenetv1.py` of
https://github.com/bellymonster/Weighted-Soft-Label-Distillation, whose checkpoints can be imported.
It is the ImageNet student that this family of papers calls "MobileNet(V2)".
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Conv, Linear, Outputs, pool_and_classify, relu

# Width and stride of each unit.
_UNITS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)
_TAPPED = (3, 5, 11, 13)


class MobileNetV1(nn.Module):
    """A strided stem, followed by thirteen units of a depthwise 3x3 and a 1x1 convolution.

    Attributes:
        classes: number of logits.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    classes: int
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 32  # five halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("fc",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the stem and of the last unit at each size of the map, from a
        quarter of the image's size down.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        x = Conv(32, stride=2, name="model.0.0")(x)
        x = relu(norm(name="model.0.1")(x, mask))
        features: tuple[jax.Array, ...] = (x,)
        preact: tuple[jax.Array, ...] = (x,)
        for unit, (width, stride) in enumerate(_UNITS, start=1):
            name, channels = f"model.{unit}.{{}}", x.shape[-1]
            x = Conv(channels, stride=stride, groups=channels, name=name.format(0))(x)
            x = relu(norm(name=name.format(1))(x, mask))
            x = Conv(width, kernel=1, name=name.format(3))(x)
            pre = norm(name=name.format(4))(x, mask)
            x = relu(pre)
            if unit in _TAPPED:
                features += (x,)
                preact += (pre,)
        fc = Linear(self.classes, name="fc")
        return pool_and_classify(x, fc, features, preact)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"MobileNetV1": MobileNetV1}
