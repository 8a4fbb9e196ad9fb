"""Random variables and inputs of networks for the tests of several modules."""

import jax
import jax.numpy as jnp
import numpy as np

# Each file of the networks' golden values -> our names of its networks, where they differ.
GOLDEN_FILES = {
    "models": {},
    "selfkd_models": {"ResNet101_cifar": "ResNet101", "DenseNet121_cifar": "DenseNet121"},
    "imagenet_models": {"ResNet18": "ResNet18_imagenet", "ResNet34": "ResNet34_imagenet"},
}


def random_like(shapes, seed=0):
    """Return random positive arrays with the shapes and types of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype), shapes)


def variables_of(network, images_shape=(1, 8, 8, 3), seed=0):
    """Return random variables of a network, running statistics included, as NumPy arrays."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(images_shape))
    return random_like(shapes, seed)


def normal(*shape, mean=0.0, std=1.0, seed=0):
    """Return float32 numbers that are drawn from a normal distribution."""
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)
