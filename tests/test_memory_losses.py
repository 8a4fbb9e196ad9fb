"""What CRD draws, what SSKD keeps, and that extreme inputs give finite gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ipwd_jax.losses.base import Batch, cross_entropy
from ipwd_jax.losses.crd import CRD, contrast_loss, draw_negatives, permute
from ipwd_jax.losses.kd import KD, KDHead
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.sskd import SSKD, best_ranked, similarity
from ipwd_jax.losses.weighting import ipwd_scores, ipwd_weights
from ipwd_jax.models import Outputs

LABELS = jnp.arange(60, dtype=jnp.int32) % 5


def batch(rows, mask=None, epoch=1):
    index = jnp.arange(rows, dtype=jnp.int32)
    return Batch(
        image=jnp.zeros((rows, 4, 4, 3)),
        label=LABELS[:rows],
        index=index,
        view=index,
        mask=jnp.ones(rows) if mask is None else jnp.asarray(mask, jnp.float32),
        epoch=jnp.int32(epoch),
        train_labels=LABELS,
        key=jax.random.key(0),
    )


# Negatives


draw = jax.jit(draw_negatives, static_argnums=4)


def drawn(count, key=0, index=(3, 4, 5)):
    index = jnp.array(index)
    return np.asarray(draw(jax.random.key(key), index, LABELS[index], LABELS, count))


def test_negatives_are_of_other_classes_and_never_twice():
    rows = drawn(40)
    assert rows.shape == (3, 40)
    for i, row in zip((3, 4, 5), rows, strict=True):
        assert len(set(row)) == 40 and (LABELS[row] != LABELS[i]).all()


def test_all_of_the_other_classes_can_be_drawn():
    assert set(drawn(48)[0]) == {i for i in range(60) if LABELS[i] != LABELS[3]}


def test_negatives_depend_on_epoch_and_index_alone():
    np.testing.assert_array_equal(drawn(10)[1], drawn(10, index=(4,))[0])
    assert (drawn(10) != drawn(10, key=1)).any()
    assert (drawn(10)[0] != drawn(10)[1]).any()


def test_negatives_are_uniform():
    index = jnp.arange(0, 60, 5)
    rows = jax.vmap(lambda k: draw(jax.random.key(k), index, LABELS[index], LABELS, 8))(
        jnp.arange(400)
    )
    counts = np.bincount(np.asarray(rows).ravel(), minlength=60)
    assert (counts[::5] == 0).all()  # the class of every sample here
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
    # How many of the first third come to lie in the first tenth.
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


# Rows to learn from


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


# Extreme inputs


TERMS = {
    "kd": KD(),
    "kd_head": KDHead(),
    "crd": CRD(feat_dim=4, negatives=6, train_size=60),
    "sskd": SSKD(),
    "pskd": PSKD(train_size=60, epochs=3),
}
KINDS = {
    "zero": lambda rng, shape: np.zeros(shape),
    "identical": lambda rng, shape: np.broadcast_to(rng.normal(size=shape[1:]), shape),
    "large": lambda rng, shape: 1e4 * rng.choice([-1, 1], shape),
    "normal": lambda rng, shape: rng.normal(size=shape),
}


@functools.cache
def value_and_gradients(name):
    """The mean loss of fresh variables and its gradients, as a compiled function."""
    term = TERMS[name]

    def outputs(logits, embedding):
        return Outputs(logits, embedding, (), (), {"kd": logits})

    @jax.jit
    def compute(logits, embedding, of_teacher):
        rows = batch(len(logits) // (4 if term.rotations else 1))
        teacher = Outputs(*of_teacher, (), ())
        variables = term.init(jax.random.key(0), outputs(logits, embedding), teacher, rows)

        def loss(logits, embedding, params):
            now = {**variables, "params": params}
            seen = outputs(logits, embedding)
            value, _ = term.apply(now, seen, teacher, rows, mutable=["memory"])
            of_labels = term.label_loss(seen, rows)
            return (value if of_labels is None else of_labels + value).mean()

        params = variables.get("params", {})
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(logits, embedding, params)

    return compute


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_value_and_gradient_are_finite(name, kind, rows, dtype):
    term, rng = TERMS[name], np.random.default_rng(0)
    seen = rows * (4 if term.rotations else 1)

    def draw(width):
        return jnp.asarray(KINDS[kind](rng, (seen, width)), dtype)

    value, gradients = value_and_gradients(name)(draw(5), draw(8), (draw(5), draw(8)))
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_and_above_one(kind):
    rng = np.random.default_rng(0)
    logits = [jnp.asarray(KINDS[kind](rng, (3, 5)), jnp.float32) for _ in range(2)]
    for standardize in (True, False):
        scores = ipwd_scores(*logits, LABELS[:3], standardize)
        weights = ipwd_weights(*scores)
        assert np.isfinite(weights).all() and (weights >= 1).all()
    assert np.isfinite(cross_entropy(logits[0], LABELS[:3])).all()
