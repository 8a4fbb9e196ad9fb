"""Terms that compare two views of each image: MLKD, CRLD, and the cross-entropy beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helpers import KINDS, batch, normal, value
from scipy.special import log_softmax, softmax

from ipwd_jax.losses.ce import CrossEntropy
from ipwd_jax.losses.crld import CRLD
from ipwd_jax.losses.mlkd import MLKD, mlkd_loss
from ipwd_jax.models.base import Outputs

CLASSES = 5
TERMS = {
    "mlkd": MLKD(),
    "mlkd_ls": MLKD(2.0, standardize=True),
    "mlkd_selects": MLKD(selects=True),
    "crld": CRLD(weak_threshold=0.5),
}
NAMES = pytest.mark.parametrize(
    "name",
    [name if "_" not in name else pytest.param(name, marks=pytest.mark.slow) for name in TERMS],
)


def views(rows, make):
    weak, strong = (Outputs(make((rows, CLASSES)), make((rows, 2)), (), ()) for _ in range(2))
    return weak.with_strong(strong)


@functools.cache
def loss_and_gradient(name):
    """Return a compiled function of the loss and of the gradient of its sum over valid rows."""

    def total(student, teacher, rows):
        loss = value(TERMS[name], {}, student, teacher, rows)
        return (loss * rows.mask.astype(loss.dtype)).sum() if loss.ndim else loss, loss

    def call(student, teacher, rows):
        (_, loss), grad = jax.value_and_grad(total, has_aux=True)(student, teacher, rows)
        return loss, (grad.logits, grad.strong.logits)

    return jax.jit(call)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@NAMES
@pytest.mark.parametrize("rubbish", [1.0, 1e30])
def test_padding_changes_nothing(name, rubbish):
    with jax.enable_x64(True):
        student, teacher = views(5, normal(1)), views(5, normal(2, 3.0))
        noise = normal(3, rubbish)
        padded = [
            x.map_rows(lambda rows: np.concatenate([rows, noise((3, *rows.shape[1:]))]))
            for x in (student, teacher)
        ]
        loss, grads = loss_and_gradient(name)(student, teacher, batch(5))
        rows = batch(8, [1] * 5 + [0] * 3)
        found, found_grads = loss_and_gradient(name)(*padded, rows)
        np.testing.assert_allclose(found[:5] if found.ndim else found, loss, rtol=1e-9)
        assert_close([x[:5] for x in found_grads], grads)
        assert not any(np.any(x[5:]) for x in found_grads)


@NAMES
def test_two_devices_are_as_one(name):
    with jax.enable_x64(True):
        student, teacher = views(6, normal(1)), views(6, normal(2, 3.0))
        rows, term = batch(6, [1] * 5 + [0]), TERMS[name]
        spread = term.clone(axis_name="devices") if hasattr(term, "axis_name") else term

        def total(student):
            def one(student, teacher, mask):
                return value(spread, {}, student, teacher, batch(3).replace(mask=mask))

            parts = jax.tree.map(
                lambda x: x.reshape(2, 3, *x.shape[1:]), (student, teacher, rows.mask)
            )
            loss = jax.vmap(one, axis_name="devices")(*parts)
            return loss.mean() if loss.ndim == 1 else (loss.reshape(6) * rows.mask).sum()

        loss, grads = loss_and_gradient(name)(student, teacher, rows)
        expected = (loss * rows.mask).sum() if loss.ndim else loss
        found, grad = jax.jit(jax.value_and_grad(total))(student)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert_close((grad.logits, grad.strong.logits), grads)


kinds = st.sampled_from(("zero", "constant", "identical", "large", "huge", "tiny", "normal"))


@NAMES
@settings(max_examples=15)
@given(kinds, kinds, st.sampled_from([(1, "float32"), (3, "bfloat16")]))
def test_degenerate_inputs_are_finite(name, student_kind, teacher_kind, rows_and_dtype):
    rows, dtype = rows_and_dtype
    rng = np.random.default_rng(0)
    seen = (
        views(rows, lambda shape, kind=kind: jnp.asarray(KINDS[kind](rng, shape), dtype))
        for kind in (student_kind, teacher_kind)
    )
    loss, grads = loss_and_gradient(name)(*seen, batch(rows))
    assert loss.shape == ((rows,) if TERMS[name].per_sample else ())
    assert loss.dtype == jnp.float32
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (loss, *grads))


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("teacher", ["odd", "ties"])
def test_mlkd_by_hand(selects, teacher):
    """With an odd number of samples, and with equal confidences, the shares are not one half."""
    s, s_strong, t, t_strong = (normal(i)((5, CLASSES)) for i in range(4))
    if teacher == "ties":
        t = t[np.argsort(softmax(t, axis=1).max(axis=1))[[2, 2, 2, 0, 4]]]

    def kd(a, b, T):
        log_a, log_b = log_softmax(a / T, axis=1), log_softmax(b / T, axis=1)
        return T**2 * (np.exp(log_b) * (log_b - log_a)).sum(axis=1)

    p = softmax(t, axis=1)
    samples, classes = (x <= np.percentile(x, 50) for x in (p.max(axis=1), p.sum(axis=0)))
    assert samples.mean() == (0.8 if teacher == "ties" else 0.6)

    def mean(rows, low):
        return (rows * low).mean() if selects else rows.mean() * low.mean()

    expected = np.zeros(3)
    for T in (4, 3, 5, 2, 6):
        a, b = softmax(s / T, axis=1), softmax(t / T, axis=1)
        expected[0] += mean(kd(s, t, T), samples)
        expected[0] += (kd(s, t, T) if T in (2, 6) else kd(s_strong, t_strong, T)).mean()
        expected[1] += mean(np.square(b.T @ b - a.T @ a).sum(axis=1), classes)
        expected[2] += mean(np.square(b @ b.T - a @ a.T).sum(axis=1), samples)
    with jax.enable_x64(True):
        t = jnp.asarray(t)
        for weights, part in zip(np.eye(3), expected, strict=True):
            found = mlkd_loss(
                (s, s_strong), (t, t_strong), jnp.ones(5), weights=tuple(weights), selects=selects
            )
            np.testing.assert_allclose(found, part, rtol=1e-9)


def test_crld_leaves_out_what_the_teacher_is_not_sure_of():
    student, teacher = views(4, normal(1)), views(4, normal(2))
    sure = 20 * jnp.eye(4, CLASSES)
    weak = jnp.where(jnp.array([[1], [1], [0], [0]]), sure, 0)
    strong = jnp.where(jnp.array([[1], [0], [1], [0]]), sure, 0)
    teacher = teacher.replace(logits=weak).with_strong(teacher.replace(logits=strong))
    within = value(CRLD(across_weight=0.0, strong_threshold=0.5), {}, student, teacher, batch(4))
    across = value(CRLD(within_weight=0.0, strong_threshold=0.5), {}, student, teacher, batch(4))
    np.testing.assert_array_equal(within > 0, [True, True, False, False])
    np.testing.assert_array_equal(across > 0, [True, False, True, False])


def test_cross_entropy_is_the_sum_of_both_views():
    student, rows = views(3, normal(1)), batch(3)
    of_each = [
        value(CrossEntropy(), {}, x.replace(strong=None), None, rows)
        for x in (student, student.strong)
    ]
    found = value(CrossEntropy(), {}, student, None, rows)
    np.testing.assert_allclose(found, sum(of_each), rtol=1e-6)


def test_a_term_that_does_not_ask_for_the_view_is_told_so():
    student = views(2, normal(1)).replace(strong=None)
    with pytest.raises(ValueError, match="without declaring `strong_view`"):
        value(CRLD(), {}, student, student, batch(2))
