"""CRD: the samples that it draws, its loss by hand, and padding rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import TRAIN_LABELS, batch
from scipy import stats

from ipwd_jax.losses.crd import CRD, contrast_loss, draw_negatives, permute
from ipwd_jax.models import Outputs

draw = jax.jit(draw_negatives, static_argnums=4)


def drawn(count, key=0, index=(3, 4, 5)):
    index = jnp.array(index)
    return np.asarray(draw(jax.random.key(key), index, TRAIN_LABELS[index], TRAIN_LABELS, count))


def test_negatives_are_of_other_classes_and_never_twice():
    rows = drawn(40)
    assert rows.shape == (3, 40)
    for i, row in zip((3, 4, 5), rows, strict=True):
        assert len(set(row)) == 40 and (TRAIN_LABELS[row] != TRAIN_LABELS[i]).all()


def test_all_of_the_other_classes_can_be_drawn():
    assert set(drawn(48)[0]) == {i for i in range(60) if TRAIN_LABELS[i] != TRAIN_LABELS[3]}


def test_negatives_depend_on_epoch_and_index_alone():
    np.testing.assert_array_equal(drawn(10)[1], drawn(10, index=(4,))[0])
    assert (drawn(10) != drawn(10, key=1)).any()
    assert (drawn(10)[0] != drawn(10)[1]).any()


def test_negatives_are_uniform():
    index = jnp.arange(0, 60, 5)
    rows = jax.vmap(lambda k: draw(jax.random.key(k), index, TRAIN_LABELS[index], TRAIN_LABELS, 8))(
        jnp.arange(400)
    )
    counts = np.bincount(np.asarray(rows).ravel(), minlength=60)
    assert (counts[::5] == 0).all()  # the class that all of these samples have
    others = np.delete(counts, np.arange(0, 60, 5))
    assert abs(others / others.mean() - 1).max() < 0.15  # five standard deviations


place = jax.jit(permute)


@pytest.mark.parametrize("size", [1, 2, 3, 60, 1000])
def test_a_permutation_takes_each_number_elsewhere(size):
    everywhere = place(jax.random.key(size), jnp.arange(size), jnp.int32(size))
    assert sorted(np.asarray(everywhere)) == list(range(size))


def test_permutations_are_uniform_in_pairs_and_of_large_sets():
    keys = jax.random.split(jax.random.key(0), 60_000)
    a, b = np.asarray(jax.vmap(lambda k: place(k, jnp.arange(2), jnp.int32(12)))(keys)).T
    counts = np.bincount(12 * a + b, minlength=144).reshape(12, 12)
    assert stats.chisquare(counts[~np.eye(12, dtype=bool)]).pvalue > 1e-3
    # The number of the first third that is moved into the first tenth.
    size, count = 9_000, 3_000
    moved = jax.vmap(lambda k: place(k, jnp.arange(count), jnp.int32(size)))(keys[:400])
    inside = (np.asarray(moved) < size // 10).sum(axis=1)
    expected = stats.hypergeom(size, size // 10, count)
    assert abs(inside.mean() - expected.mean()) < 4 * expected.std() / 20
    assert inside.var() / expected.var() == pytest.approx(1, abs=0.3)


def test_contrast_loss_by_hand():
    scores, n = np.array([[2.0, 0.5, 0.25]]), 10
    noise = 2 / n
    expected = -np.log(2 / (2 + noise)) - np.log(noise / (0.5 + noise))
    expected -= np.log(noise / (0.25 + noise))
    np.testing.assert_allclose(contrast_loss(jnp.array(scores), n), expected, rtol=1e-5)


def test_crd_leaves_out_padding():
    term = CRD(feat_dim=4, negatives=6, train_size=60)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(5, 8)).astype(np.float32)
    rubbish = np.concatenate([embedding, 1e3 * rng.normal(size=(2, 8)).astype(np.float32)])

    def run(x, rows):
        outputs = Outputs(jnp.zeros((len(x), 5)), jnp.asarray(x), (), ())
        variables = jax.jit(term.init)(jax.random.key(0), outputs, outputs, rows)
        apply = jax.jit(functools.partial(term.apply, mutable=["memory"]))
        return apply(variables, outputs, outputs, rows)

    value, memory = run(embedding, batch(5))
    padded, memory_of_padded = run(rubbish, batch(7, mask=[1] * 5 + [0] * 2))
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), memory, memory_of_padded)
