"""Losses of maps and of relations: rows that only pad, several devices, degenerate inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipwd_jax.losses import TERMS
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.nst import nst_loss
from ipwd_jax.losses.rkd import rkd_losses
from ipwd_jax.losses.vid import VID
from ipwd_jax.models.base import Outputs

RELATIONAL = ("sp", "cc", "rkd", "pkt")
PER_SAMPLE = ("at", "fitnet", "vid", "nst")
# (H, W, C) of the maps, stem first, and the length of the embedding.
STUDENT = ((4, 4, 2), (4, 4, 3), (2, 2, 4)), 4
TEACHER = ((4, 4, 2), (2, 2, 5), (4, 4, 3)), 5


def outputs(shapes, rows, make):
    maps, width = shapes
    features = tuple(make((rows, *shape)) for shape in maps)
    return Outputs(
        logits=make((rows, 3)), embedding=make((rows, width)), features=features, preact=features
    )


def batch(mask):
    index = jnp.arange(len(mask), dtype=jnp.int32)
    return Batch(
        image=jnp.zeros((len(mask), 1, 1, 1)),
        label=index,
        index=index,
        view=index,
        mask=jnp.asarray(mask, jnp.float32),
        epoch=jnp.int32(0),
        train_labels=index,
        key=jax.random.key(0),
    )


def normal(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return lambda shape: scale * rng.standard_normal(shape)


@functools.cache
def variables(name):
    student, teacher = (outputs(shapes, 2, np.zeros) for shapes in (STUDENT, TEACHER))
    return jax.jit(TERMS[name]().init)(jax.random.key(1), student, teacher, batch((1, 1)))


def value(term, given, student, teacher, rows):
    return term.apply(given, student, teacher, rows, mutable=["batch_stats"])[0]


@functools.cache
def value_and_gradients(name):
    """Jitted: the mean loss, the loss, the gradients to the parameters and to the student."""
    term, init = TERMS[name](), variables(name)

    def mean(params, student, teacher, rows):
        loss = value(term, {**init, "params": params}, student, teacher, rows)
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)).mean(), loss

    def call(student, teacher, rows):
        grad = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
        (_, loss), grads = grad(init.get("params", {}), student, teacher, rows)
        return loss, grads

    return jax.jit(call)


def assert_close(found, expected):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * scale),
        found,
        expected,
    )


@pytest.mark.parametrize("name", RELATIONAL)
@pytest.mark.parametrize("rubbish", [1.0, 1e30])
def test_padding_changes_nothing(name, rubbish):
    with jax.enable_x64(True):
        student, teacher = outputs(STUDENT, 5, normal(1)), outputs(TEACHER, 5, normal(2))
        padded = (
            jax.tree.map(
                lambda x, y: np.concatenate([x, y]), full, outputs(s, 3, normal(seed, rubbish))
            )
            for full, s, seed in ((student, STUDENT, 3), (teacher, TEACHER, 4))
        )
        call = value_and_gradients(name)
        loss, (params, inputs) = call(student, teacher, batch([1] * 5))
        found, (found_params, found_inputs) = call(*padded, batch([1] * 5 + [0] * 3))
        assert found.shape == () and found.dtype == jnp.float64
        np.testing.assert_allclose(found, loss, rtol=1e-9)
        if params:
            assert_close(found_params, params)
        assert_close(jax.tree.map(lambda x: x[:5], found_inputs), inputs)
        for x in jax.tree.leaves(found_inputs):
            assert not np.any(x[5:])


@pytest.mark.parametrize("name", RELATIONAL)
def test_two_devices_are_as_one(name):
    """The mean of the devices' losses has the value and the gradient of the global batch."""
    with jax.enable_x64(True):
        student, teacher = outputs(STUDENT, 6, normal(1)), outputs(TEACHER, 6, normal(2))
        rows = batch([1] * 5 + [0])
        spread = TERMS[name](axis_name="devices")

        def split(tree):
            return jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tree)

        def mean(params, student):
            def one(student, teacher, mask):
                given = {**variables(name), "params": params}
                return value(spread, given, student, teacher, batch(np.ones(3)).replace(mask=mask))

            devices = jax.vmap(one, axis_name="devices")
            return devices(*split((student, teacher, rows.mask))).mean()

        params = variables(name).get("params", {})
        loss, grads = value_and_gradients(name)(student, teacher, rows)
        call = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        found, found_grads = call(params, student)
        np.testing.assert_allclose(found, loss, rtol=1e-9)
        assert_close(found_grads, grads)


def degenerate(kind, seed):
    """Makes arrays of one kind of input."""
    rng = np.random.default_rng(seed)

    def make(shape):
        x = {
            "zero": lambda: np.zeros(shape),
            "constant": lambda: np.full(shape, 3.0),
            "identical": lambda: np.broadcast_to(rng.standard_normal(shape[1:]), shape),
            "opposite": lambda: np.broadcast_to(
                np.resize([1.0, -1.0], shape[0]).reshape(-1, *(1,) * (len(shape) - 1)), shape
            ),
            "sparse": lambda: np.maximum(rng.standard_normal(shape) - 1, 0),
            "huge": lambda: 1e4 * rng.standard_normal(shape),
            "tiny": lambda: 1e-12 * rng.standard_normal(shape),
            "normal": lambda: rng.standard_normal(shape),
        }[kind]()
        return x

    return make


KINDS = ("zero", "constant", "identical", "opposite", "sparse", "huge", "tiny", "normal")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RELATIONAL + PER_SAMPLE)
def test_degenerate_inputs_are_finite(name, rows, dtype):
    @given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 3))
    @settings(max_examples=30, deadline=None)
    def check(student_kind, teacher_kind, seed):
        student, teacher = (
            jax.tree.map(
                lambda x: x.astype(jnp.dtype(dtype)),
                outputs(shapes, rows, degenerate(kind, seed + offset)),
            )
            for shapes, kind, offset in ((STUDENT, student_kind, 0), (TEACHER, teacher_kind, 10))
        )
        loss, grads = value_and_gradients(name)(student, teacher, batch([1] * rows))
        assert loss.shape == ((rows,) if name in PER_SAMPLE else ())
        assert loss.dtype == jnp.float32
        for x in jax.tree.leaves((loss, grads)):
            assert np.all(np.isfinite(np.asarray(x, np.float32)))

    check()


@pytest.mark.parametrize("channels", [2, 40])
def test_nst_against_all_products(channels):
    with jax.enable_x64(True):
        s, t = (jnp.asarray(normal(c)((2, 3, 3, c))) for c in (3, channels))
        found = nst_loss(s, t)

    def unit(x):
        x = np.asarray(x).reshape(2, 9, -1)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def kernel(a, b):
        return (np.einsum("bpc,bpd->bcd", a, b) ** 2).mean(axis=(1, 2))

    s, t = unit(s), unit(t)
    np.testing.assert_allclose(found, kernel(s, s) + kernel(t, t) - 2 * kernel(s, t), rtol=1e-9)


def test_rkd_against_loops():
    student, teacher = np.random.default_rng(0).standard_normal((2, 4, 3))

    def huber(x):
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)

    distance = np.mean(
        [huber(x) for x in (distances(student) - distances(teacher)).ravel().tolist()]
    )
    angle = np.mean(
        [huber(cosine(student, *ijk) - cosine(teacher, *ijk)) for ijk in np.ndindex(4, 4, 4)]
    )
    with jax.enable_x64(True):
        found = rkd_losses(jnp.asarray(student), jnp.asarray(teacher), jnp.ones(4))
    np.testing.assert_allclose(found, [distance, angle], rtol=1e-9)


def test_rkd_of_near_samples_does_not_cancel():
    x = 100 + 1e-2 * np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    exact = x.astype(np.float64)
    teacher = np.random.default_rng(1).standard_normal((4, 8))
    with jax.enable_x64(True):
        expected = rkd_losses(jnp.asarray(exact), jnp.asarray(teacher), jnp.ones(4))
    found = rkd_losses(jnp.asarray(x), jnp.asarray(teacher, jnp.float32), jnp.ones(4))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_vid_variance_starts_at_five():
    student, teacher = (outputs(shapes, 2, np.zeros) for shapes in (STUDENT, TEACHER))
    params = jax.jit(VID().init)(jax.random.key(1), student, teacher, batch((1, 1)))["params"]
    for part in params.values():
        variance = np.log1p(np.exp(part["log_scale"])) + 1e-5
        np.testing.assert_allclose(variance, 5, rtol=1e-6)
