"""Every network starts from the distribution of its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ipwd_jax import models

# Network: rule of the convolutions, rule and bias of the classifier.
RULES = {
    "resnet8x4": ("he", "torch", "torch"),
    "wrn_16_2": ("he", "torch", "zero"),
    "vgg8": ("he", 0.01, "zero"),
    "MobileNetV2": ("he", 0.01, "zero"),
    "ShuffleV1": ("torch", "torch", "torch"),
    "ShuffleV2": ("torch", "torch", "torch"),
    "ResNet18": ("he", "torch", "torch"),
    "ResNet18_imagenet": ("he", "torch", "torch"),
    "MobileNetV1": ("torch", "torch", "torch"),
    "PreActResNet18": ("torch", "torch", "torch"),
    "ResNet101": ("torch", "torch", "torch"),
    "DenseNet121": ("torch", "torch", "torch"),
    "ResNeXt29_8x64d": ("he", "kaiming_fan_in", "zero"),
}
QUICK = {"resnet8x4", "wrn_16_2", "vgg8"}


def expected(rule, shape):
    """Standard deviation, and the largest value where there is one."""
    fan_in, fan_out = np.prod(shape[:-1]), np.prod(shape) / (shape[-2] if len(shape) > 1 else 1)
    if rule == "he":
        return np.sqrt(2 / fan_out), None
    if rule == "kaiming_fan_in":
        return np.sqrt(2 / fan_in), None
    if rule == "torch":
        return 1 / np.sqrt(3 * fan_in), 1 / np.sqrt(fan_in)
    return rule, None


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RULES]
)
def test_moments(name):
    conv_rule, linear_rule, bias_rule = RULES[name]
    network = models.create(name, classes=1000)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(lambda key: network.init(key, image)["params"])(jax.random.key(0))
    leaves = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params).items()}
    assert sum(kernel.ndim == 4 for kernel in leaves.values()) > 4
    for path, x in leaves.items():
        if path[-1] == "scale" or (path[-1] == "bias" and (*path[:-1], "scale") in leaves):
            assert (x == (path[-1] == "scale")).all()  # BatchNorm; no zero-gamma anywhere
        elif path[-1] == "kernel":
            std, largest = expected(conv_rule if x.ndim == 4 else linear_rule, x.shape)
            # Four standard errors of the mean and of the deviation.
            assert abs(x.mean()) < 4 * std / np.sqrt(x.size)
            assert abs(x.std() / std - 1) < 4 / np.sqrt(x.size)
            if largest:
                assert abs(x).max() <= largest * (1 + 1e-6)
            elif x.size > 10_000:
                assert abs(x).max() > 3.5 * std  # not truncated
        elif x.size == 1000:
            bound = expected("torch", leaves[*path[:-1], "kernel"].shape)[1]
            assert (x == 0).all() == (bias_rule == "zero")
            assert abs(x).max() <= bound * (1 + 1e-6)
            assert bias_rule == "zero" or abs(x).max() > 0.99 * bound
        else:
            assert (x == 0).all()  # of VGG's convolutions


@pytest.mark.parametrize(("name", "is_zero"), [("resnet8", False), ("wrn_10_1", True)])
def test_biases_of_the_classifiers(name, is_zero):
    network, images = models.create(name, classes=10), jnp.zeros((1, 8, 8, 3))
    bias = jax.jit(lambda key: network.init(key, images)["params"]["fc"]["bias"])
    assert (bias(jax.random.key(0)) == 0).all() == is_zero
