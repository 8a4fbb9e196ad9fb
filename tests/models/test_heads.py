"""The extra heads of a student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipwd_jax.models.heads import Heads


@pytest.mark.parametrize(("source", "reaches"), [("backbone", True), ("detached", False)])
def test_whether_the_gradient_of_a_head_reaches_the_backbone(source, reaches):
    heads, embedding = Heads(3, {"cls": source}), jnp.ones((2, 5))
    image = jnp.zeros((2, 8, 8, 1))
    variables = heads.init(jax.random.key(0), embedding, image, True)

    def loss(variables, embedding):
        return heads.apply(variables, embedding, image, True)["cls"][:, 0].sum()

    of_head, of_embedding = jax.grad(loss, argnums=(0, 1))(variables, embedding)
    assert np.any(of_head["params"]["cls"]["kernel"])
    assert np.any(of_embedding) == reaches
