from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from ipwd_jax import models
from ipwd_jax.errors import UserError
from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, relu
from ipwd_jax.pytorch.names import from_torch, to_torch


def variables_of(network, images_shape=(1, 8, 8, 3), seed=0):
    """Random variables, batch statistics included, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(images_shape))
    return jax.tree.map(lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype), shapes)


def normal(*shape, mean=0.0, std=1.0, seed=0):
    return np.random.default_rng(seed).normal(mean, std, shape).astype(np.float32)


# BatchNorm


def statistics(mean=0.0, var=1.0, channels=3):
    return {"mean": jnp.full(channels, mean), "var": jnp.full(channels, var)}


def batch_norm(x, stats, mask=None, train=True):
    """Output and new statistics of a layer that scales by 1, 2, 3... and adds 0.5."""
    params = {"scale": jnp.arange(1.0, 1 + x.shape[-1]), "bias": jnp.full(x.shape[-1], 0.5)}
    layer = BatchNorm(train=train)
    y, new = layer.apply({"params": params, "batch_stats": stats}, x, mask, mutable="batch_stats")
    return y, new["batch_stats"]


def test_batch_norm_keeps_the_unbiased_variance():
    x = normal(4, 5, 2, 3, mean=2.0, std=3.0)
    y, new = batch_norm(x, statistics(mean=1.0, var=4.0))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-5) * np.arange(1, 4) + 0.5
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(new["mean"], 0.9 * 1 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * 4 + 0.1 * var * 40 / 39, rtol=1e-5)


def test_batch_norm_evaluates_by_the_running_statistics():
    x = normal(4, 5, 2, 3)
    stats = statistics(mean=1.0, var=4.0)
    y, new = batch_norm(x, stats, train=False)
    np.testing.assert_allclose(y, (x - 1) / np.sqrt(4 + 1e-5) * np.arange(1, 4) + 0.5, atol=1e-6)
    assert new == {} or jax.tree.all(jax.tree.map(np.array_equal, new, stats))


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_padding_counts_in_no_statistic(dtype):
    valid, weight = normal(5, 4, 4, 3, mean=3.0), normal(5, 4, 4, 3, seed=1)
    padded = np.concatenate([valid, normal(3, 4, 4, 3, mean=100.0, seed=2)])
    mask = np.array([1] * 5 + [0] * 3, dtype)

    def loss(x, mask):
        y, new = batch_norm(x, statistics(mean=1.0), mask)
        return (y[:5] * weight).sum(), (y[:5], new)

    gradient = jax.grad(loss, has_aux=True)
    expected_gradient, expected = gradient(valid, None)
    actual_gradient, actual = gradient(padded, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)
    np.testing.assert_allclose(actual_gradient[:5], expected_gradient, atol=1e-5)
    np.testing.assert_array_equal(actual_gradient[5:], 0)


def test_batch_norm_gradient_is_exact():
    x, weight = normal(4, 3, mean=5.0), normal(4, 3, seed=1)
    with jax.enable_x64(True):
        check_grads(
            lambda x: (batch_norm(x, statistics(mean=1.0))[0] * weight).sum(),
            (jnp.asarray(x, jnp.float64),),
            order=1,
            modes=["rev"],
        )


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.567])
def test_a_constant_channel_stays_finite(value):
    x = np.full((8, 7, 5, 3), value, np.float32)
    weight = normal(8, 7, 5, 3)

    def loss(x):
        y, new = batch_norm(x, statistics())
        return (y * weight).sum(), (y, new)

    gradient, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(x)
    np.testing.assert_allclose(y, 0.5, atol=0.2)
    assert all(np.isfinite(a).all() for a in (gradient, *new.values()))


def test_one_value_per_channel():
    y, new = batch_norm(np.full((1, 1, 1, 3), 7.0, np.float32), statistics())
    np.testing.assert_array_equal(y, 0.5)
    np.testing.assert_allclose(new["var"], 0.9)


def test_a_mean_far_from_zero_costs_no_accuracy_once_it_is_known():
    x = normal(64, 8, 8, 3, mean=1e4)
    y, new = batch_norm(x, statistics(mean=1e4 + 3))
    exact = x.astype(np.float64)
    mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    expected = (exact - mean) / np.sqrt(var + 1e-5) * np.arange(1, 4) + 0.5
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * var * 4096 / 4095, rtol=1e-5)


def test_batch_norm_takes_statistics_in_float32():
    x = normal(64, 8, 8, 3, mean=3.0)
    expected, _ = batch_norm(x, statistics())
    y, new = batch_norm(x.astype(jnp.bfloat16), statistics())
    assert y.dtype == jnp.bfloat16 and new["mean"].dtype == new["var"].dtype == jnp.float32
    np.testing.assert_allclose(new["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=0.1)


def test_initialisation_and_immutable_statistics_are_left_alone():
    x = normal(4, 3, mean=5.0)
    layer = BatchNorm(train=True, axis_name="devices")  # an axis that initialisation does not need
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
    y = BatchNorm(train=True).apply(variables, x)  # raises if it tried to store
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_is_flax_relu(dtype):
    x = jnp.array([-jnp.inf, -2.0, -1e-30, 0.0, 1e-30, 3.0, jnp.inf, jnp.nan], dtype)
    for f, g in ((relu, nn.relu), (jax.vmap(jax.grad(relu)), jax.vmap(jax.grad(nn.relu)))):
        assert f(x).dtype == dtype
        np.testing.assert_array_equal(f(x)[:-1], g(x)[:-1])
    assert jnp.isnan(relu(x)[-1])  # a run that diverges must show it


# Initialisers


def test_convolutions_start_he_normal_by_fan_out():
    layer = conv(128, stride=2, name="conv")
    kernel = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
    std = np.sqrt(2 / (9 * 128))
    assert kernel.std() == pytest.approx(std, rel=0.02)
    assert abs(kernel.mean()) < 0.02 * std
    assert abs(kernel).max() > 3.5 * std  # not truncated


def test_linear_starts_as_in_pytorch():
    params = Linear(3000).init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    for x in (params["kernel"], params["bias"]):
        assert 0.99 / 8 < abs(x).max() <= 1 / 8
        assert x.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.03)


@pytest.mark.parametrize(("name", "is_zero"), [("resnet8", False), ("wrn_10_1", True)])
def test_biases_of_the_classifiers(name, is_zero):
    network, images = models.create(name, classes=10), jnp.zeros((1, 8, 8, 3))
    bias = jax.jit(lambda key: network.init(key, images)["params"]["fc"]["bias"])
    assert (bias(jax.random.key(0)) == 0).all() == is_zero


# Networks


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn_16_2"])
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (1, 40, 24, 3), (3, 7, 5, 4)])
def test_any_image_and_any_number_of_classes(name, shape):
    network = models.create(name, classes=7)
    with jax.numpy_rank_promotion("raise"):
        outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros(shape))
    batch, height, width, _ = shape
    assert outputs.logits.shape == (batch, 7)
    assert outputs.extra_logits == {}
    for maps in (outputs.features, outputs.preact):
        sizes = [x.shape[:3] for x in maps]
        halves = [(batch, -(-height // s), -(-width // s)) for s in (1, 1, 2, 4)]
        assert sizes == halves
    assert outputs.embedding.shape == (batch, outputs.features[-1].shape[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_outputs_have_the_type_of_inputs_and_parameters(name, dtype):
    network = models.create(name, classes=7)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct((1, 8, 8, 3), dtype)
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes["params"])
        outputs = jax.eval_shape(network.apply, {**shapes, "params": cast}, images)
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_2"])
def test_a_padded_batch_trains_as_the_batch_alone(name):
    network = models.create(name, classes=5)
    variables = variables_of(network)
    images = normal(4, 8, 8, 3)
    padded, mask = np.concatenate([images, 9 * images[:2]]), np.array([1, 1, 1, 1, 0, 0])

    def train(images, mask=None):
        return network.apply(variables, images, True, mask, mutable="batch_stats")

    expected, expected_stats = jax.jit(train)(images)
    actual, actual_stats = jax.jit(train)(padded, mask)
    np.testing.assert_allclose(actual.logits[:4], expected.logits, rtol=1e-3, atol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        actual_stats,
        expected_stats,
    )


def test_taps_before_the_activation():
    network = models.create("resnet8", classes=5)
    outputs = jax.jit(network.apply)(variables_of(network), normal(2, 8, 8, 3))
    np.testing.assert_array_equal(outputs.features[0], outputs.preact[0])
    for after, before in zip(outputs.features[1:], outputs.preact[1:], strict=True):
        np.testing.assert_array_equal(after, jax.nn.relu(before))
    np.testing.assert_allclose(outputs.embedding, outputs.features[-1].mean((1, 2)), rtol=1e-6)


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


def test_outputs_can_be_replaced_and_mapped():
    outputs = Outputs(jnp.ones((2, 3)), jnp.ones((2, 4)), (), ())
    doubled = jax.tree.map(lambda x: 2 * x, outputs.replace(extra_logits={"a": jnp.ones((2, 3))}))
    assert doubled.extra_logits["a"][0, 0] == 2 and outputs.extra_logits == {}


# Names and sizes


def test_any_valid_wrn_has_a_name():
    network = models.create("wrn_28_10", classes=100, axis_name="devices")
    assert (network.blocks, network.width, network.axis_name) == (4, 10, "devices")
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 36_536_884


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet8_x4", "Did you mean 'resnet8x4'?"),
        ("WRN-40-2", "Did you mean 'wrn_40_2'?"),
        ("densenet", "Did you mean 'DenseNet121'?"),
        ("alexnet", "Valid: DenseNet121, MobileNetV1,"),
        ("wrn_17_2", "the depth is 6 n + 4 (10, 16, 22,"),
        ("wrn_17_2", "Nearest: 'wrn_16_2'"),
        ("wrn_4_1", "Nearest: 'wrn_10_1'"),
        ("wrn_40_0", "the width at least 1. Nearest: 'wrn_40_1'"),
    ],
)
def test_wrong_names(name, hint):
    with pytest.raises(UserError) as error:
        models.create(name, classes=10)
    assert f"network '{name}'" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2"])
def test_images_that_are_too_small(name):
    models.check_input(name, 4, 4)
    with pytest.raises(UserError, match=f"{name} needs images of at least 4x4 .*found 3x32"):
        models.check_input(name, 3, 32)


# PyTorch's names


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
