"""Weights of heads that are certain: the formula to float32 rounding, and its limits."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import batch, outputs, weighting

from ipwd_jax.losses.weighting import (
    init_memory,
    ipwd_scores,
    ipwd_weights,
    surprise,
    weigh,
    wsld_weights,
)


def confident(classes, label, margin=1.0, other=0):
    """One row (1, classes) of float32 logits: `margin` at the label, noise elsewhere."""
    noise = 1e-3 * np.random.default_rng(other).normal(size=classes)
    noise[label] = margin
    return np.asarray(noise[None], np.float32)


def exact_surprise(logits, label, standardize=False):
    """The cross-entropy of one row as a sum over the other classes, at any margin."""
    z = np.asarray(logits, np.longdouble)
    if standardize:
        z = (z - z.mean()) / (z.std() + np.longdouble(1e-6))
    others = np.exp(np.delete(z, label) - z[label])
    return float(np.log1p(others.sum()))


@pytest.mark.parametrize("margin", [0.0, 1.0, 10.0, 20.0, 60.0, 80.0])
def test_cross_entropy_is_accurate_near_zero(margin):
    logits = confident(50, 3, margin)
    found = surprise(jnp.asarray(logits), jnp.array([3]))
    np.testing.assert_allclose(found, exact_surprise(logits[0], 3), rtol=1e-5)


def test_cross_entropy_of_two_classes_against_rational_numbers():
    """log(1 + e^-25), from the first terms of its series in e^-25."""
    small = Fraction(math.exp(-25))
    expected = float(small - small**2 / 2 + small**3 / 3)
    found = surprise(jnp.array([[25.0, 0.0]]), jnp.array([0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("ratio", ["A", "B"])
def test_heads_that_are_certain_of_different_classes(classes, ratio):
    kd, cls = confident(classes, 7), confident(classes, 3, other=1)
    scores = ipwd_scores(jnp.asarray(kd), jnp.asarray(cls), jnp.array([3]))
    expected = [exact_surprise(x[0], 3, standardize=True) for x in (kd, cls)]
    np.testing.assert_allclose(np.concatenate(scores), expected, rtol=1e-4)
    if ratio == "B":
        expected.reverse()
    weights = ipwd_weights(*scores, ratio)
    np.testing.assert_allclose(weights, 1 + expected[0] / expected[1], rtol=1e-4)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("classes", "margin"), [(10, 5.0), (1000, 50.0), (10, 1e4), (20_000, 1.0)])
def test_heads_that_agree_weigh_two_however_certain(classes, margin, standardize):
    logits = jnp.asarray(confident(classes, 3, margin))
    scores = ipwd_scores(logits, logits, jnp.array([3]), standardize)
    for ratio in ("A", "B"):
        assert ipwd_weights(*scores, ratio) == 2
        assert ipwd_weights(*map(np.asarray, scores), ratio) == 2


def test_the_largest_weight_leaves_room_for_a_loss():
    config = weighting(name="ipwd", standardize=False)
    right, wrong = (1e5 * np.eye(10)[[x] * 4] for x in (3, 5))
    weights, memory = weigh(
        config, outputs(wrong, cls=right), None, batch(), init_memory(config, 4)
    )
    assert np.isfinite(weights * np.float32(1e4) * np.float32(1e6)).all()
    assert (weights[2:] > 1e20).all() and (weights >= 1).all()  # whose label is 3
    assert np.isfinite(memory["weight"]).all()


def test_wsld_of_certain_networks():
    student, teacher = confident(10, 3, 14.0), confident(10, 3, 13.0, other=1)
    s, t = (exact_surprise(x[0], 3) for x in (student, teacher))
    found = wsld_weights(jnp.asarray(student), jnp.asarray(teacher), jnp.array([3]))
    np.testing.assert_allclose(found, -math.expm1(-s / (t + 1e-7)), rtol=1e-5)
