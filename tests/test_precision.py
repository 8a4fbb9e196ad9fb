"""Numbers that are never rounded, whatever `config.precision` is, and means of bfloat16 maps."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import batch

from ipwd_jax import data, models
from ipwd_jax.assemble import assemble
from ipwd_jax.config import default
from ipwd_jax.data.resident import resident
from ipwd_jax.losses.base import adaptive_avg_pool
from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.fsp import fsp_matrices
from ipwd_jax.losses.nst import nst_loss
from ipwd_jax.losses.pkt import pkt_loss
from ipwd_jax.losses.rkd import rkd_losses
from ipwd_jax.losses.sp import sp_loss
from ipwd_jax.losses.sskd import similarity
from ipwd_jax.models.base import avg_pool
from ipwd_jax.parallel import AXIS
from ipwd_jax.precision import cast, of_products
from ipwd_jax.step import train_step

ROWS, MAPS = jnp.ones((8, 5)), jnp.ones((8, 4, 4, 3))
SIMILARITIES = {
    "sp": lambda x: sp_loss(MAPS * x, MAPS, jnp.ones(8)),
    "pkt": lambda x: pkt_loss(ROWS * x, ROWS, jnp.ones(8)),
    "rkd": lambda x: sum(rkd_losses(ROWS * x, ROWS, jnp.ones(8))),
    "nst": lambda x: nst_loss(MAPS * x, MAPS).sum(),
    "sskd": lambda x: similarity(ROWS * x).sum(),
    "fsp": lambda x: fsp_matrices([MAPS * x, MAPS])[0].sum(),
    "pooling": lambda x: adaptive_avg_pool(MAPS * x, 2, 3).sum(),
}


def products(function, *args):
    """Return the shape of each product with TF32, and whether it has full precision."""
    with of_products("tf32"):
        text = jax.jit(function).lower(*args).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert lines
    shapes = [re.search(r"-> tensor<([\dx]*)xf32>", line)[1] for line in lines]
    return [
        (shape, "precision = [HIGHEST, HIGHEST]" in line)
        for shape, line in zip(shapes, lines, strict=True)
    ]


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_are_not_rounded_to_tf32(name):
    found = products(jax.grad(SIMILARITIES[name]), jnp.ones(()))
    assert all(full for _, full in found), found


def test_scores_of_crd_are_not_rounded_to_tf32():
    term = CRD(feat_dim=4, negatives=6, train_size=60)
    outputs = models.Outputs(jnp.ones((8, 5)), jnp.ones((8, 7)), (), ())
    variables = jax.jit(term.init)(jax.random.key(0), outputs, outputs, batch(8))

    def loss(embedding):
        seen = outputs.replace(embedding=embedding)
        return term.apply(variables, seen, outputs, batch(8), mutable=["memory"])[0]

    found = products(jax.grad(loss), outputs.embedding)
    assert ("8x60", True) in found and ("8x60", False) not in found
    assert ("8x4", False) in found, "the linear embeddings are ordinary products"


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (8, 8, 0)])
def test_average_pooling_of_bfloat16_rounds_once(kernel, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.abs(rng.normal(size=(4, 8, 8, 16))), jnp.bfloat16)
    found = avg_pool(x, kernel, stride, padding)
    expected = avg_pool(x.astype(jnp.float32), kernel, stride, padding)
    assert found.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    mean = np.asarray(x, np.float64)[:, :kernel, :kernel].mean((1, 2))
    if not padding:
        np.testing.assert_allclose(np.asarray(found, np.float64)[:, 0, 0], mean, rtol=2**-8)


@pytest.mark.parametrize(
    "name",
    ["resnet8", "wrn_10_1", "ShuffleV1", "vgg8"]  # the last has biases in its convolutions
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("MobileNetV1", "MobileNetV2", "ShuffleV2_0.2", "DenseNet121")
    ],
)
def test_means_of_bfloat16_maps_are_summed_in_float32(name):
    network = models.create(name, classes=5)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    low = jax.eval_shape(lambda variables: cast("bfloat16", variables), shapes)

    def total(variables, images):
        outputs, _ = network.apply(variables, images, train=True, mutable=["batch_stats"])
        return outputs.logits.sum().astype(jnp.float32)

    for function in (network.apply, jax.grad(total)):
        text = str(jax.make_jaxpr(function)(low, images))
        types = re.findall(r":(\w+)\[[\d,]*\] = reduce(?:_window)?_sum\[", text)
        assert types and set(types) - {"i32"} == {"f32"}


def test_the_separate_network_of_ipwd_star_rounds_as_the_student_does():
    """Every convolution of the step, forward and backward, takes bfloat16."""
    images, labels = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 2
    dataset = data.from_arrays(images, labels, images, labels)
    config = default()
    config.precision, config.batch_size, config.model.name = "bfloat16", 8, "resnet8"
    config.loss.update({"ce": 1.0, "cls": 1.0})
    config.terms.cls.source = "network"
    experiment = assemble(config, dataset, None)
    state = jax.eval_shape(lambda: experiment.begin(0, experiment.initial_state(seed=0)))
    rows = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8))
    step = partial(train_step, experiment.step_spec(0))
    split = resident(dataset, dataset.train)
    traced = jax.make_jaxpr(step, axis_env=[(AXIS, 1)])(state, split, {}, *rows)
    found = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", str(traced))
    assert len(found) > 40 and set(found) == {"bf16"}
