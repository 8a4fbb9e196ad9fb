"""Every network takes any image and any number of classes, and a wrong name is explained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_helpers import normal, variables_of

from ipwd_jax import models
from ipwd_jax.errors import UserError


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
        ("MobileNetV2_0.05", "the width must be at least 0.0625"),
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


def test_the_last_map_of_a_long_image_has_pixels():
    network, image = models.create("vgg8", 10), np.zeros((1, 64, 8, 3), np.float32)
    outputs, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    assert outputs.pre_pool.shape == (1, 8, 1, 512)
