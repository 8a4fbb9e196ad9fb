"""The network that a run trains: a classifier without a bias, and what excludes it."""

import jax
import numpy as np
import pytest
from helpers import settings

import ipwd_jax
from ipwd_jax import models, student, train
from ipwd_jax.assemble import assemble
from ipwd_jax.errors import UserError
from ipwd_jax.state import network_shapes


@pytest.mark.parametrize(
    ("name", "variance"), [("wrn_10_1", 2 / 40), ("resnet8", 2 / 40), ("vgg8", 1 / (3 * 512))]
)
def test_how_a_classifier_without_a_bias_begins(name, variance):
    network = models.create(name, 40)
    shapes = network_shapes(network, (32, 32, 3))
    drawn = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    layer = network.head_modules[-1]
    drawn["params"][layer]["kernel"] *= variance**0.5  # what a network draws itself is kept
    found = student.without_bias(network, drawn, jax.random.key(0))
    kernel = found["params", layer, "kernel"]
    np.testing.assert_allclose(np.square(kernel).mean(), variance, rtol=0.1)
    assert not np.any(found["params", layer, "bias"])


def test_a_run_without_a_classifier_bias(squares, tmp_path):
    config = settings(model__classifier_bias=False, loss__cat_kd=1.0, epochs=1)
    train.run(config, tmp_path / "run", squares)
    fc = ipwd_jax.load_student(tmp_path / "run").variables["params"]["fc"]
    assert not fc["bias"].any() and fc["kernel"].any()


@pytest.mark.parametrize(
    ("changes", "other"),
    [({"model__pretrained": "runs/a"}, "config.model.pretrained"), ({"loss__simkd": 1.0}, "simkd")],
)
def test_what_brings_another_classifier(changes, other, squares):
    config = settings(model__classifier_bias=False, **changes)
    with pytest.raises(UserError, match=f"but {other} brings another one"):
        assemble(config, squares, None)
