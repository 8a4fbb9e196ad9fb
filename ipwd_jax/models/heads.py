"""Classifiers beside a network's own: linear ones on its embedding, or a second network."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from jax import lax

from ipwd_jax.models.base import Linear

SOURCES = ("backbone", "detached", "network")  # what a head may compute from; see `Heads`


class Heads(nn.Module):
    """Extra logits by name.

    Attributes:
        classes: width of each head.
        sources: head name -> "backbone", a linear head whose gradient reaches the embedding,
            "detached", one whose gradient does not, or "network", the logits of `network`.
        network: trained beside the student, on the same images; only where a source asks for it.
    """

    classes: int
    sources: Mapping[str, str]
    network: nn.Module | None = None

    @nn.compact
    def __call__(
        self, embedding: jax.Array, image: jax.Array, train: bool, mask: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Embedding (B, D) of images (B, H, W, channels) -> head name -> (B, classes) logits."""
        logits = {}
        for name, source in self.sources.items():
            if source == "network":
                assert self.network is not None
                logits[name] = self.network(image, train=train, mask=mask).logits
            else:
                detached = source == "detached"
                x = lax.stop_gradient(embedding) if detached else embedding
                logits[name] = Linear(self.classes, name=name)(x)
        return logits
