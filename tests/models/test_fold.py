"""The folded copy of a network answers as the network does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_helpers import normal, variables_of

from ipwd_jax import models
from ipwd_jax.models.fold import apply_folded, fold

SIZES = {"ResNet18_imagenet": 32, "MobileNetV1": 32, "MobileNetV2": 16}
QUICK = ["wrn_10_1"]
SLOW = [
    "vgg8",
    "resnet8x4",
    "MobileNetV2",
    "ShuffleV1",
    "ShuffleV2",
    "ResNet50",
    "ResNet18_imagenet",
    "MobileNetV1",
]
SLOW += ["PreActResNet18", "DenseNet121", "ResNeXt29_8x64d"]


def plausible(network, shape):
    """Fresh parameters with running statistics and scales away from 0 and 1."""
    drawn = variables_of(network, shape)
    fresh = jax.jit(network.init)(jax.random.key(0), jnp.zeros(shape))
    return jax.tree.map(lambda a, b: a if a.ndim == 1 else np.asarray(b), drawn, fresh)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_equal_to_the_network(name):
    network = models.create(name, classes=7)
    images = normal(4, SIZES.get(name, 8), SIZES.get(name, 8), 3)
    variables = plausible(network, (1, *images.shape[1:]))
    folded = fold(network, variables, images.shape[1:])
    expected = jax.jit(network.apply)(variables, images)
    actual = jax.jit(lambda v, x: apply_folded(network, v, x))(folded, images)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_in_bfloat16_it_is_as_good_as_the_network():
    network = models.create("resnet8x4", classes=7)
    images = normal(32, 8, 8, 3)
    variables = plausible(network, (1, 8, 8, 3))
    exact = jax.jit(network.apply)(variables, images).logits

    def error(apply, variables):
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
        logits = jax.jit(apply)(low, jnp.asarray(images, jnp.bfloat16)).logits
        return np.abs(np.float32(logits) - exact).mean()

    folded = fold(network, variables, (8, 8, 3))
    assert error(lambda v, x: apply_folded(network, v, x), folded) < 1.5 * error(
        network.apply, variables
    )


def test_no_norm_is_left_behind_a_convolution():
    network = models.create("resnet8", classes=7)
    folded = fold(network, variables_of(network), (8, 8, 3))
    assert not [name for name, layer in folded["affine"].items() if "gain" in layer]
    network = models.create("wrn_10_1", classes=7)
    folded = fold(network, variables_of(network), (8, 8, 3))
    kept = {name for name, layer in folded["affine"].items() if "gain" in layer}
    # The first block's reads the stem's convolution, which the shortcut and the tap read too.
    assert kept == {"bn1", *(f"block{i}.layer.0/bn1" for i in (1, 2, 3))}
