"""Any valid wide ResNet has a name, and reading its maps does not disturb its statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from models_helpers import normal, variables_of

from ipwd_jax import models


def test_wrn_taps_do_not_update_statistics_twice():
    network = models.create("wrn_10_1", classes=5)
    variables = variables_of(network)
    train = jax.jit(partial(network.apply, train=True, mutable="batch_stats"))
    outputs, new = train(variables, normal(2, 8, 8, 3))
    layers = [
        lambda tree: tree["batch_stats"]["block2.layer.0"]["bn1"],
        lambda tree: tree["batch_stats"]["block3.layer.0"]["bn1"],
        lambda tree: tree["batch_stats"]["bn1"],
    ]
    for layer, tap in zip(layers, outputs.features[1:], strict=True):
        expected = 0.9 * layer(variables)["mean"] + 0.1 * tap.mean((0, 1, 2))
        np.testing.assert_allclose(layer(new)["mean"], expected, rtol=1e-4)


def test_any_valid_wrn_has_a_name():
    network = models.create("wrn_28_10", classes=100, axis_name="devices")
    assert (network.blocks, network.width, network.axis_name) == (4, 10, "devices")
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 36_536_884
