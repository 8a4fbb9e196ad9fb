"""SSKD: the rows that it learns from, its similarity, and padding rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import batch

from ipwd_jax.losses.sskd import SSKD, best_ranked, similarity
from ipwd_jax.models import Outputs


def test_best_ranked_keeps_right_rows_and_the_least_wrong():
    scores = jnp.array([[3.0, 1, 2], [3, 1, 2], [3, 2, 1], [1, 3, 2], [1, 2, 3.0]])
    target = jnp.array([0, 1, 1, 0, 2])  # ranks 0, 2, 1, 2, 0
    for share, kept in ((0.0, [0, 4]), (0.34, [0, 2, 4]), (0.67, [0, 1, 2, 4]), (1.0, range(5))):
        keep = best_ranked(scores, target, jnp.ones(5), share)
        np.testing.assert_array_equal(np.flatnonzero(keep), list(kept), err_msg=str(share))
    keep = best_ranked(scores, target, jnp.array([1, 1, 0, 1, 0]), 0.5)
    np.testing.assert_array_equal(np.flatnonzero(keep), [0, 1])


def test_similarity_is_the_cosine():
    x = np.random.default_rng(0).normal(size=(8, 5))
    rows = np.asarray(similarity(jnp.asarray(x, jnp.float32)))
    assert rows.shape == (6, 2)
    expected = x[6] @ x[0] / np.linalg.norm(x[6]) / np.linalg.norm(x[0])
    np.testing.assert_allclose(rows[4, 0], expected, rtol=1e-5)


def sskd(student, teacher, rows, method=None):
    term = SSKD()

    def outputs(x):
        return Outputs(jnp.tanh(x[:, :5]), x, (), ())

    seen = outputs(student), outputs(teacher)
    variables = term.init(jax.random.key(0), *seen, rows)
    return term.apply(variables, *seen, rows, method=method)


@pytest.mark.parametrize("method", [None, "pretrain"])
def test_sskd_leaves_out_padding(method):
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(12, 6)), jnp.float32) for _ in range(2))
    value = sskd(student, teacher, batch(3), method)
    rubbish = jnp.full((4, 6), 50.0)
    padded = sskd(
        jnp.concatenate([student, rubbish]),
        jnp.concatenate([teacher, rubbish]),
        batch(4, mask=[1, 1, 1, 0]),
        method,
    )
    np.testing.assert_allclose(padded, value, rtol=1e-5)
