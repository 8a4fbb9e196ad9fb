"""Properties of many terms.

Padding rows and the number of devices change nothing, and extreme inputs give finite values and
gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helpers import (
    KINDS,
    SHORT_STUDENT,
    SHORT_TEACHER,
    SMALL_STUDENT,
    SMALL_TEACHER,
    STUDENT,
    TEACHER,
    TRAIN_LABELS,
    assert_close,
    batch,
    init,
    normal,
    outputs,
    random_outputs,
    value,
)

from ipwd_jax import losses
from ipwd_jax.losses.ab import AB
from ipwd_jax.losses.abkd import ABKD
from ipwd_jax.losses.crd import CRD
from ipwd_jax.losses.ctkd import CTKD
from ipwd_jax.losses.dkd import DKD
from ipwd_jax.losses.fsp import FSP
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import KD, KDHead
from ipwd_jax.losses.la import KDLA
from ipwd_jax.losses.nkd import NKD
from ipwd_jax.losses.ofd import OFD
from ipwd_jax.losses.pskd import PSKD
from ipwd_jax.losses.reviewkd import ReviewKD
from ipwd_jax.losses.rld import RLD
from ipwd_jax.losses.sskd import SSKD
from ipwd_jax.losses.ttm import TTM, WTTM
from ipwd_jax.models.base import Outputs

# Terms that compare samples, and terms of maps that do not

RELATIONAL = ("sp", "cc", "rkd", "pkt", "dist", "uskd")
PER_SAMPLE = ("at", "fitnet", "vid", "nst")
of_three_classes = functools.partial(outputs, classes=3)
batch_of_three = functools.partial(batch, labels=TRAIN_LABELS % 3)


@functools.cache
def own_variables(name):
    """Return the variables that the term draws itself."""
    student, teacher = (of_three_classes(s, 2, np.zeros) for s in (SMALL_STUDENT, SMALL_TEACHER))
    term = losses.TERMS[name]()
    return jax.jit(term.init)(jax.random.key(1), student, teacher, batch_of_three(2, (1, 1)))


@functools.cache
def value_and_gradients(name):
    """Return a jitted function that computes the loss and the gradients of its mean.

    The gradients are with respect to the parameters and to the student's outputs.
    """
    term, variables = losses.TERMS[name](), own_variables(name)

    def mean(params, student, teacher, rows):
        loss = value(term, {**variables, "params": params}, student, teacher, rows)
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)).mean(), loss

    def call(student, teacher, rows):
        grad = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
        (_, loss), grads = grad(variables.get("params", {}), student, teacher, rows)
        return loss, grads

    return jax.jit(call)


@pytest.mark.parametrize("name", RELATIONAL)
@pytest.mark.parametrize("rubbish", [1.0, 1e30])
def test_padding_changes_nothing(name, rubbish):
    with jax.enable_x64(True):
        student = of_three_classes(SMALL_STUDENT, 5, normal(1))
        teacher = of_three_classes(SMALL_TEACHER, 5, normal(2))
        padded = (
            jax.tree.map(
                lambda x, y: np.concatenate([x, y]),
                full,
                of_three_classes(shapes, 3, normal(seed, rubbish)),
            )
            for full, shapes, seed in ((student, SMALL_STUDENT, 3), (teacher, SMALL_TEACHER, 4))
        )
        call = value_and_gradients(name)
        loss, (params, inputs) = call(student, teacher, batch_of_three(5, [1] * 5))
        found, (found_params, found_inputs) = call(*padded, batch_of_three(8, [1] * 5 + [0] * 3))
        assert found.shape == () and found.dtype == jnp.float64
        assert np.isfinite(loss)
        np.testing.assert_allclose(found, loss, rtol=1e-9)
        if params:
            assert_close(found_params, params)
        assert_close(jax.tree.map(lambda x: x[:5], found_inputs), inputs)
        for x in jax.tree.leaves(found_inputs):
            assert not np.any(x[5:])


@pytest.mark.parametrize("name", RELATIONAL)
def test_two_devices_are_as_one(name):
    """The mean of the devices' losses has the value and the gradients of one global batch."""
    with jax.enable_x64(True):
        student = of_three_classes(SMALL_STUDENT, 6, normal(1))
        teacher = of_three_classes(SMALL_TEACHER, 6, normal(2))
        rows = batch_of_three(6, [1] * 5 + [0])
        spread = losses.TERMS[name](axis_name="devices")

        def split(tree):
            return jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tree)

        def mean(params, student):
            def one(student, teacher, mask, label):
                given = {**own_variables(name), "params": params}
                rows = batch_of_three(3).replace(mask=mask, label=label)
                return value(spread, given, student, teacher, rows)

            devices = jax.vmap(one, axis_name="devices")
            return devices(*split((student, teacher, rows.mask, rows.label))).mean()

        params = own_variables(name).get("params", {})
        loss, grads = value_and_gradients(name)(student, teacher, rows)
        call = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        found, found_grads = call(params, student)
        assert np.isfinite(loss)
        np.testing.assert_allclose(found, loss, rtol=1e-9)
        assert_close(found_grads, grads)


def degenerate(kind, seed):
    """Return a function that makes an input of one kind from its shape."""
    rng = np.random.default_rng(seed)
    return lambda shape: KINDS[kind](rng, shape)


degenerate_kinds = st.sampled_from(
    ("zero", "constant", "identical", "opposite", "sparse", "huge", "tiny", "normal")
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RELATIONAL + PER_SAMPLE)
def test_degenerate_inputs_are_finite(name, rows, dtype):
    @given(degenerate_kinds, degenerate_kinds, st.integers(0, 3))
    @settings(max_examples=30)
    def check(student_kind, teacher_kind, seed):
        student, teacher = (
            jax.tree.map(
                lambda x: x.astype(jnp.dtype(dtype)),
                of_three_classes(shapes, rows, degenerate(kind, seed + offset)),
            )
            for shapes, kind, offset in (
                (SMALL_STUDENT, student_kind, 0),
                (SMALL_TEACHER, teacher_kind, 10),
            )
        )
        loss, grads = value_and_gradients(name)(student, teacher, batch_of_three(rows, [1] * rows))
        assert loss.shape == ((rows,) if name in PER_SAMPLE else ())
        assert loss.dtype == jnp.float32
        for x in jax.tree.leaves((loss, grads)):
            assert np.all(np.isfinite(np.asarray(x, np.float32)))

    check()


# Terms of logits and of maps that return a loss for each sample, whose variables NumPy draws

# Name -> the term, and the shapes of the student and of the teacher.
TERMS = {
    "dkd": (DKD(), STUDENT, TEACHER),
    "reviewkd": (ReviewKD(), SHORT_STUDENT, SHORT_TEACHER),
    "ab": (AB(), STUDENT, TEACHER),
    "fsp": (FSP(), STUDENT, STUDENT),
    "ft": (FT(), STUDENT, TEACHER),
    "ofd": (OFD(), STUDENT, TEACHER),
    "kd_la": (KDLA(class_prior=(0.5, 0.3, 0.1, 0.1, 0.0)), STUDENT, TEACHER),
    "kd_ls": (KD(standardize=True), STUDENT, TEACHER),
    "dkd_ls": (DKD(standardize=True), STUDENT, TEACHER),
    "nkd": (NKD(), STUDENT, TEACHER),
    "ttm": (TTM(), STUDENT, TEACHER),
    "wttm": (WTTM(), STUDENT, TEACHER),
    "rld": (RLD(), STUDENT, TEACHER),
    "rld_ls": (RLD(standardize=True), STUDENT, TEACHER),
    "ctkd": (CTKD(), STUDENT, TEACHER),
    "ctkd_dkd": (CTKD(form="dkd"), STUDENT, TEACHER),
    "ctkd_ls": (CTKD(standardize=True), STUDENT, TEACHER),
    "abkd": (ABKD(), STUDENT, TEACHER),
}


@functools.cache
def values_and_gradients(name, rows, dtype, method=None):
    """Return a compiled function of the loss of each sample and the gradients of its mean."""
    term, *shapes = TERMS[name]
    zeros = [outputs(s, rows, lambda shape: jnp.zeros(shape, dtype)) for s in shapes]
    variables = init(term, *zeros)

    def mean(params, student, teacher):
        values = value(term, variables | {"params": params}, student, teacher, batch(rows), method)
        return values.mean(), values

    function = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))
    return lambda *taps: function(variables.get("params", {}), *taps)


def check_finite(name, student, teacher, rows, dtype, method=None):
    (_, values), grads = values_and_gradients(name, rows, dtype, method)(student, teacher)
    assert values.shape == (rows,)
    assert values.dtype == jnp.float32
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in [values, *jax.tree.leaves(grads)])


kinds = st.sampled_from(["zero", "constant", "same rows", "random"])


@pytest.mark.parametrize("name", TERMS)
@given(
    rows_and_dtype=st.sampled_from([(1, "float32"), (3, "bfloat16")]),
    kind=st.tuples(kinds, kinds),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_values_and_gradients_are_finite(name, rows_and_dtype, kind, scale, seed):
    rows, dtype = rows_and_dtype
    rng = np.random.default_rng(seed)

    def make(kind):
        def array(shape):
            if kind == "random":
                x = rng.standard_normal(shape)
            elif kind == "same rows":
                x = np.broadcast_to(rng.standard_normal(shape[1:]), shape)
            else:
                x = np.full(shape, kind == "constant")
            return jnp.asarray(scale * x, dtype)

        return array

    _, *shapes = TERMS[name]
    student, teacher = (outputs(s, rows, make(k)) for s, k in zip(shapes, kind, strict=True))
    check_finite(name, student, teacher, rows, dtype)
    if name == "ft":
        check_finite(name, student, teacher, rows, dtype, "pretrain")


@pytest.mark.parametrize("name", TERMS)
def test_padding_does_not_reach_the_other_rows(name):
    term, *shapes = TERMS[name]
    student, teacher = (random_outputs(s, 4, seed) for seed, s in enumerate(shapes))
    variables = init(term, student, teacher)
    padded = batch(4, mask=(1, 1, 1, 0))
    first = [jax.tree.map(lambda x: x[:3], taps) for taps in (student, teacher)]
    rubbish = [jax.tree.map(lambda x: x.at[3].set(1e3), taps) for taps in (student, teacher)]
    expected = value(term, variables, *first, batch(3))
    np.testing.assert_allclose(
        value(term, variables, *rubbish, padded)[:3], expected, rtol=1e-5, atol=1e-6
    )


# Terms of logits and embeddings, some of which have a memory

WITHOUT_MAPS = {
    "kd": KD(),
    "kd_head": KDHead(),
    "crd": CRD(feat_dim=4, negatives=6, train_size=60),
    "sskd": SSKD(),
    "pskd": PSKD(train_size=60, epochs=3),
}


@functools.cache
def mean_and_gradients(name):
    """Return a compiled function of the mean loss, with the labels' part, and its gradients."""
    term = WITHOUT_MAPS[name]

    def outputs(logits, embedding):
        return Outputs(logits, embedding, (), (), {"kd": logits})

    @jax.jit
    def compute(logits, embedding, of_teacher):
        rows = batch(len(logits) // (4 if term.rotations else 1), epoch=1)
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


@pytest.mark.parametrize("name", WITHOUT_MAPS)
@settings(max_examples=12)
@given(
    kind=st.sampled_from(["identical", "large", "normal", "zero"]),
    rows=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_value_and_gradient_are_finite(name, kind, rows, dtype):
    term, rng = WITHOUT_MAPS[name], np.random.default_rng(0)
    seen = rows * (4 if term.rotations else 1)

    def draw(width):
        return jnp.asarray(KINDS[kind](rng, (seen, width)), dtype)

    value, gradients = mean_and_gradients(name)(draw(5), draw(8), (draw(5), draw(8)))
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))
