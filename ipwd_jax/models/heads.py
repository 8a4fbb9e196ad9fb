"""Extra linear heads on a network's embedding, beside its own classifier."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from jax import lax

from ipwd_jax.models.base import Linear


class Heads(nn.Module):
    """One linear classifier per name, all on the same embedding.

    Attributes:
        classes: width of each head.
        gradient: head name -> whether its gradient reaches the backbone.
    """

    classes: int
    gradient: Mapping[str, bool]

    @nn.compact
    def __call__(self, embedding: jax.Array) -> dict[str, jax.Array]:
        """(B, D) -> head name -> (B, classes) logits."""
        return {
            name: Linear(self.classes, name=name)(
                embedding if reaches else lax.stop_gradient(embedding)
            )
            for name, reaches in self.gradient.items()
        }
