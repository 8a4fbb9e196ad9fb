"""Tensors keep every bit on the way to PyTorch's names and layouts and back."""

import jax
import numpy as np
import pytest
from models_helpers import variables_of

from ipwd_jax import models
from ipwd_jax.errors import UserError
from ipwd_jax.pytorch.names import from_torch, to_torch


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_1"])
def test_weights_survive_the_round_trip_bit_for_bit(name):
    variables = variables_of(models.create(name, classes=5))
    tensors = to_torch(variables)
    tensors["bn1.num_batches_tracked"] = np.array(7)
    back = from_torch(tensors, jax.eval_shape(lambda: variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert {x.dtype for x in jax.tree.leaves(back)} == {np.dtype(np.float32)}


def test_names_and_layouts_are_pytorchs():
    variables = variables_of(models.create("wrn_16_1", classes=5))
    tensors = to_torch(variables)
    kernel = variables["params"]["block2.layer.0"]["convShortcut"]["kernel"]
    tensor = tensors["block2.layer.0.convShortcut.weight"]
    assert tensor.shape == (32, 16, 1, 1)
    assert tensor[3, 2, 0, 0] == kernel[0, 0, 2, 3]
    np.testing.assert_array_equal(tensors["fc.weight"].T, variables["params"]["fc"]["kernel"])
    var = variables["batch_stats"]["block1.layer.0"]["bn1"]["var"]
    np.testing.assert_array_equal(tensors["block1.layer.0.bn1.running_var"], var)


def test_every_tensor_that_does_not_fit_is_named():
    variables = variables_of(models.create("resnet8", classes=5))
    tensors = to_torch(variables)
    del tensors["layer2.0.bn1.running_mean"]
    tensors["fc.weight"] = np.zeros((100, 64))
    tensors["layer1.0.downsample.0.weight"] = np.zeros((16, 16, 1, 1))
    with pytest.raises(UserError) as error:
        from_torch(tensors, variables)
    lines = str(error.value).splitlines()
    for part in (
        "1 missing, 1 not in the network, 1 of another shape",
        "layer2.0.bn1.running_mean -  (32,)",
        "layer1.0.downsample.0.weight (16, 16, 1, 1) -",
        "fc.weight (100, 64) (5, 64)",
    ):
        assert part.split() in [line.split()[-len(part.split()) :] for line in lines]


def test_weights_of_another_network_give_a_short_message():
    variables = variables_of(models.create("resnet20", classes=5))
    with pytest.raises(UserError, match="and 87 more") as error:
        from_torch({}, variables)
    assert len(str(error.value).splitlines()) == 23
