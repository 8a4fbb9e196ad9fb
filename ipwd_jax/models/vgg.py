"""VGG with BatchNorm for small images (Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556).

The networks follow `models/vgg.py` of https://github.com/HobbitLong/RepDistiller, whose checkpoints
can be imported.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
from flax import linen as nn

from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, max_pool, pool_and_classify, relu


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, each with a bias, BatchNorm and ReLU.

    As in the reference, the map is halved after each of the first three blocks, and after the
    fourth block only if images have at least 64 pixels per side. With 32x32 images, the last two
    blocks both see 4x4 maps.

    Attributes:
        widths: channels of the convolutions of each block.
        classes: number of logits.
        axis_name: mapped axis over which batch statistics are synchronised; see `BatchNorm`.
    """

    widths: tuple[tuple[int, ...], ...]
    classes: int
    axis_name: str | None = None

    smallest_image: ClassVar[int] = 8  # three halvings leave a deepest map of one pixel
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Classify images `x` (B, H, W, channels); `mask` (B,) is 0 for padding rows.

        The taps are the outputs of the blocks. The `preact` of the first block is its output after
        the ReLU.
        """
        norm = partial(BatchNorm, train=train, axis_name=self.axis_name)
        halvings = 4 if x.shape[1] >= 64 and x.shape[2] >= 16 else 3
        features: tuple[jax.Array, ...] = ()
        preact: tuple[jax.Array, ...] = ()
        for block, widths in enumerate(self.widths):
            if 0 < block <= halvings:
                x = max_pool(x, 2)
            for i, width in enumerate(widths):
                name = f"block{block}.{{}}"  # the reference counts conv, BatchNorm and ReLU
                layer = conv(
                    width, use_bias=True, bias_init=nn.initializers.zeros, name=name.format(3 * i)
                )
                pre = norm(name=name.format(3 * i + 1))(layer(x), mask)
                x = relu(pre)
            features += (x,)
            preact += (pre if block else x,)
        small = nn.initializers.normal(0.01)
        classifier = Linear(
            self.classes, kernel_init=small, bias_init=nn.initializers.zeros, name="classifier"
        )
        return pool_and_classify(x, classifier, features, preact)

    def preact_norms(self) -> list[tuple[str, ...]]:
        """Paths of the BatchNorm layers whose outputs are the `preact` after the first block."""
        return [(f"block{i}.{3 * len(w) - 2}",) for i, w in enumerate(self.widths) if i]


def _widths(*convolutions: int) -> tuple[tuple[int, ...], ...]:
    return tuple((w,) * n for w, n in zip((64, 128, 256, 512, 512), convolutions, strict=True))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg8": partial(VGG, widths=_widths(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, widths=_widths(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, widths=_widths(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, widths=_widths(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, widths=_widths(2, 2, 4, 4, 4)),
}
