"""Extra heads beside a network's own classifier: linear ones on its embedding, or a network."""

from collections.abc import Mapping

import flax.linen as nn
import jax
from jax import lax

from ipwd_jax.models.base import Linear

SOURCES = ("backbone", "detached", "network")  # see `Heads`


class Heads(nn.Module):
    """The extra heads of a student, which return their logits by name.

    Attributes:
        classes: number of logits of each head.
        sources: source of each head, by name: "backbone" for a linear head whose gradient reaches
            the embedding, "detached" for a linear head whose gradient does not, or "network" for
            the logits of `network`.
        network: a network that is trained beside the student on the same images; needed only if a
            head has the source "network".
    """

    classes: int
    sources: Mapping[str, str]
    network: nn.Module | None = None

    @nn.compact
    def __call__(
        self, embedding: jax.Array, image: jax.Array, train: bool, mask: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Embedding (B, D) and image (B, H, W, channels) -> logits (B, classes) by head name."""
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
