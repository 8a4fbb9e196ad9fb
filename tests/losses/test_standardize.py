"""Standardised logits: their properties, and the terms that can use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import STUDENT, TEACHER, batch, init, random_outputs, value

from ipwd_jax import losses
from ipwd_jax.losses.base import as_seen, standardize_logits

# Term -> further settings; the relations of MLKD see the logits as they are.
TERMS = {"kd": {}, "dkd": {}, "rld": {}, "ctkd": {}}
TERMS |= {"mlkd": {"class_weight": 0.0, "sample_weight": 0.0}}


def test_mean_and_unbiased_deviation():
    z = standardize_logits(5 + 3 * jax.random.normal(jax.random.key(0), (4, 20)))
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.std(z, axis=1, ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("logit", [0.0, 0.1, -1e4])
def test_equal_logits_have_no_gradient(logit):
    rows = jnp.stack([jnp.full(100, logit), jnp.arange(100.0)])
    z, pull = jax.vjp(standardize_logits, rows)
    (gradient,) = pull(jnp.ones_like(z).at[:, 0].set(7.0))
    np.testing.assert_array_equal(z[0], 0)
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0


@pytest.mark.parametrize("name", TERMS)
def test_scale_and_shift_of_either_network_do_not_matter(name):
    term = losses.TERMS[name](standardize=True, **TERMS[name])
    seen = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
    moved = [x.replace(logits=4 * x.logits - 2) for x in seen]
    student, teacher, *moved = (as_seen(term, x) for x in (*seen, *moved))
    variables = init(term, student, teacher)
    expected = value(term, variables, student, teacher, batch(3))
    np.testing.assert_allclose(value(term, variables, *moved, batch(3)), expected, rtol=1e-3)
    plain = losses.TERMS[name](**TERMS[name])
    assert np.abs(value(plain, variables, student, teacher, batch(3)) - expected).max() > 1e-3


def test_these_terms_and_the_extra_head_have_the_setting():
    found = {name for name in losses.TERMS if "standardize" in losses.hyper_parameters(name)}
    assert found == {*TERMS, "kd_head"}
