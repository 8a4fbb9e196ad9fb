"""The layers and their initial values are those of PyTorch, and padding never counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads
from models_helpers import normal

from ipwd_jax import models
from ipwd_jax.models.base import BatchNorm, Linear, Outputs, conv, relu


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


def test_a_batch_of_nothing_but_padding_stays_finite():
    """Each device of several has its own statistics then, and the last batch can leave one none."""
    network, x = models.create("resnet20", 2), normal(2, 8, 8, 3)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jnp.full(a.shape, 0.1), variables)

    @jax.jit
    def gradients(params, mask):
        def loss(params):
            outputs, _ = network.apply(
                {**variables, "params": params}, x, train=True, mask=mask, mutable=["batch_stats"]
            )
            return (outputs.logits.sum(axis=1) * mask).sum()

        return jax.grad(loss)(params)

    found = jax.tree.leaves(gradients(variables["params"], jnp.zeros(2)))
    assert all(np.isfinite(gradient).all() for gradient in found)


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


def test_outputs_can_be_replaced_and_mapped():
    outputs = Outputs(jnp.ones((2, 3)), jnp.ones((2, 4)), (), ())
    doubled = jax.tree.map(lambda x: 2 * x, outputs.replace(extra_logits={"a": jnp.ones((2, 3))}))
    assert doubled.extra_logits["a"][0, 0] == 2 and outputs.extra_logits == {}
