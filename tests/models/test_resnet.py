"""The maps of a ResNet are given before and after the last activation of each stage."""

import jax
import numpy as np
from models_helpers import normal, variables_of

from ipwd_jax import models


def test_taps_before_the_activation():
    network = models.create("resnet8", classes=5)
    outputs = jax.jit(network.apply)(variables_of(network), normal(2, 8, 8, 3))
    np.testing.assert_array_equal(outputs.features[0], outputs.preact[0])
    for after, before in zip(outputs.features[1:], outputs.preact[1:], strict=True):
        np.testing.assert_array_equal(after, jax.nn.relu(before))
    np.testing.assert_allclose(outputs.embedding, outputs.features[-1].mean((1, 2)), rtol=1e-6)
