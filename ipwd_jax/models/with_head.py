"""A network with another head."""

import jax
from flax import linen as nn

from ipwd_jax.models.base import Outputs


class WithHead(nn.Module):
    """A network whose outputs a head turns into those of the whole, for images of one size.

    Attributes:
        backbone: any network of this package.
        head: `head(outputs, train, mask) -> Outputs`. Its attribute `frozen_modules` names those of
            its modules that are never trained.
    """

    backbone: nn.Module
    head: nn.Module
    head_modules = ("head",)

    @property
    def frozen_modules(self) -> tuple[str, ...]:
        """The paths of the modules that are never trained."""
        return tuple(f"head/{name}" for name in self.head.frozen_modules)

    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> Outputs:
        """Images (B, H, W, channels) -> the outputs of the head."""
        return self.head(self.backbone(x, train=train, mask=mask), train, mask)
