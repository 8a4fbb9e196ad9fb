"""The networks are those of the public PyTorch implementations, tensor for tensor.

In float64, so that a disagreement is a difference of definition and not of rounding.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_helpers import GOLDEN_FILES

from ipwd_jax import models
from ipwd_jax.pytorch.names import from_torch, to_torch

RECIPE = helpers.recipe()
# In float64, depthwise convolutions take up to 170 times as long with the default profile.
COMPILER = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
# One network of each kind of building block; the others are slow.
QUICK = {"resnet8", "wrn_16_1", "vgg8", "ShuffleV2", "MobileNetV1"}


@dataclass
class Case:
    """A network of a golden file: what it should give and what it gives in float64."""

    network: Any
    variables: Any
    eval_images: np.ndarray
    train_images: np.ndarray
    golden: dict[str, Any]  # the entries of the JSON file
    arrays: dict[str, np.ndarray]  # the entries of the npz file
    outputs: models.Outputs
    loss: np.ndarray
    train_logits: np.ndarray
    batch_stats: Any  # after one training step
    gradients: Any


def train_step(network, variables, images, labels):
    """Returns (loss, (logits, batch_stats)) and the gradient of the loss for the parameters."""

    def loss(params):
        outputs, new = network.apply(
            {**variables, "params": params}, images, train=True, mutable="batch_stats"
        )
        right = jnp.take_along_axis(jax.nn.log_softmax(outputs.logits), labels[:, None], axis=1)
        return -right.mean(), (outputs.logits, new["batch_stats"])

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def cases():
    for file in GOLDEN_FILES:
        for name in helpers.golden_json(f"{file}.json")["models"]:
            marks = () if name in QUICK else pytest.mark.slow
            yield pytest.param((file, name), id=name, marks=marks)


@pytest.fixture(scope="module", params=list(cases()))
def case(request):
    file, name = request.param
    header = helpers.golden_json(f"{file}.json")
    golden = header["models"][name]
    network = models.create(GOLDEN_FILES[file].get(name, name), header["classes"])
    arrays = {
        key.removeprefix(f"{name}/"): value
        for key, value in helpers.golden_arrays(f"{file}.npz").items()
        if key.startswith(f"{name}/")
    }

    def images(which):
        batch = len(arrays[f"{which}_logits"])
        drawn = RECIPE.images(header[f"{which}_images"], batch, header["image_size"])
        return drawn.transpose(0, 2, 3, 1)

    eval_images, train_images = images("eval"), images("train")
    labels = RECIPE.labels(header["train_labels"], len(train_images), header["classes"])
    template = jax.eval_shape(network.init, jax.random.key(0), eval_images)
    weights = RECIPE.weights(header["weights_prefix"] + name, golden["shapes"])
    variables = from_torch(weights, template)
    jit = partial(jax.jit, compiler_options=COMPILER)
    with jax.enable_x64(True):
        outputs = jit(network.apply)(variables, eval_images)
        if "grad_norms" in golden:
            step = jit(partial(train_step, network))
            (loss, (logits, batch_stats)), gradients = step(variables, train_images, labels)
        else:
            train = jit(partial(network.apply, train=True, mutable="batch_stats"))
            logits = train(variables, train_images)[0].logits
            loss = batch_stats = gradients = None
        computed = jax.device_get((outputs, loss, logits, batch_stats, gradients))
    return Case(network, variables, eval_images, train_images, golden, arrays, *computed)


def assert_close(actual, expected, relative=1e-9):
    """Within `relative` of the largest expected value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_parameter_count(case):
    assert sum(x.size for x in jax.tree.leaves(case.variables["params"])) == case.golden["params"]


@pytest.mark.parametrize("taps", ["features", "preact"])
def test_taps(case, taps):
    golden = case.golden.get(taps)
    if golden is None:
        return  # the file gives the logits alone
    maps = (*getattr(case.outputs, taps), case.outputs.embedding)
    if isinstance(golden[0], list):  # shapes alone, and of MobileNetV1 without the stem
        assert [list(x.shape) for x in maps][-len(golden) :] == golden
        return
    assert [list(x.shape) for x in maps] == [tap["shape"] for tap in golden]
    for x, tap in zip(maps, golden, strict=True):
        first = np.moveaxis(x[0], -1, 0).reshape(-1)[:3]  # the reference is channel-first
        actual = [x.mean(), np.abs(x).mean(), *first]
        assert_close(actual, [tap["mean"], tap["absmean"], *tap["first"]])


def test_pooled_and_classified_the_last_map_gives_the_logits(case):
    pooled, (kernel, bias) = case.outputs.pre_pool.mean((1, 2)), case.outputs.classifier
    assert_close(pooled, case.outputs.embedding)
    assert_close(pooled @ kernel + bias, case.outputs.logits)


def test_eval_logits(case):
    assert_close(case.outputs.logits, case.arrays["eval_logits"])


def test_train_logits(case):
    assert_close(case.train_logits, case.arrays["train_logits"])


def test_train_step(case):
    if "train_loss" not in case.golden:
        return  # the file gives the logits alone
    assert_close(case.loss, case.golden["train_loss"])
    first_bn = case.golden["first_bn"].removesuffix(".running_var")
    statistics = to_torch({"batch_stats": case.batch_stats})
    assert_close(statistics[f"{first_bn}.running_mean"], case.arrays["first_bn_mean"])
    assert_close(statistics[f"{first_bn}.running_var"], case.arrays["first_bn_var"])


def test_gradients(case):
    if "grad_norms" not in case.golden:
        return
    norms = {k: np.linalg.norm(g) for k, g in to_torch({"params": case.gradients}).items()}
    # A bias before BatchNorm (VGG) has a gradient of zero, up to rounding.
    rounding = 1e-12 * max(norms.values())
    assert norms == pytest.approx(case.golden["grad_norms"], rel=1e-9, abs=rounding)


def test_float32_logits(case):
    variables = jax.tree.map(np.float32, case.variables)
    evaluate = jax.jit(case.network.apply)
    train = jax.jit(partial(case.network.apply, train=True, mutable="batch_stats"))
    with jax.default_matmul_precision("highest"):  # a GPU would round to TF32
        eval_logits = evaluate(variables, np.float32(case.eval_images)).logits
        train_logits = train(variables, np.float32(case.train_images))[0].logits
    assert eval_logits.dtype == train_logits.dtype == np.float32
    assert_close(eval_logits, case.arrays["eval_logits"], 1e-4)
    assert_close(train_logits, case.arrays["train_logits"], 1e-4)
