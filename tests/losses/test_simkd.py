"""SimKD's head and loss: padding, devices, extreme maps, and which map is projected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helpers import KINDS, assert_close, batch, normal

from ipwd_jax import models
from ipwd_jax.losses.__main__ import extra_parameters, network_outputs
from ipwd_jax.losses.simkd import SimKD, last_map
from ipwd_jax.models.base import Outputs

TERM = SimKD()
# The student's map is larger than the teacher's, and then smaller.
SIZES = pytest.mark.parametrize("size", [4, pytest.param(1, marks=pytest.mark.slow)])


def outputs(rows, size, channels, make):
    last = make((rows, size, size, channels))
    classifier = make((channels, 3)), make((3,))
    logits, embedding = make((rows, 3)), make((rows, channels))
    return Outputs(logits, embedding, (last,), (last,), pre_pool=last, classifier=classifier)


def pair(rows, size, make, teacher_make=None):
    return outputs(rows, size, 2, make), outputs(rows, 2, 6, teacher_make or make)


def head_of(axis_name=None):
    return TERM.replacement_head(outputs(2, 2, 6, np.zeros), axis_name)


@functools.cache
def variables_of(size):
    zeros = outputs(2, size, 2, np.zeros)
    shapes = jax.eval_shape(lambda key: head_of().init(key, zeros, True), jax.random.key(0))
    draw = normal(9)
    return jax.tree.map(lambda x: np.abs(draw(x.shape)), shapes)


def loss_of(head, variables, params, student, teacher, rows):
    """Return the loss of each sample and the predictions."""
    given = {**variables, "params": params}
    student, _ = head.apply(given, student, True, rows.mask, mutable=["batch_stats"])
    return TERM.apply({}, student, teacher, rows), student.logits


@jax.jit
def loss_and_gradients(variables, student, teacher, rows):
    def total(params, student):
        loss, logits = loss_of(head_of(), variables, params, student, teacher, rows)
        return (loss * rows.mask.astype(loss.dtype)).sum(), (loss, logits)

    grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, found), (params, inputs) = grad(variables["params"], student)
    return found, params["projector"], inputs.features[-1]


@SIZES
def test_padding_changes_nothing(size):
    with jax.enable_x64(True):
        seen, noise = pair(4, size, normal(0)), normal(5, 1e3)
        padded = [
            x.map_rows(lambda rows: np.concatenate([rows, noise((2, *rows.shape[1:]))]))
            for x in seen
        ]
        expected = loss_and_gradients(variables_of(size), *seen, batch(4))
        rows = batch(6, (1, 1, 1, 1, 0, 0))
        found, params, inputs = loss_and_gradients(variables_of(size), *padded, rows)
        assert_close((tuple(x[:4] for x in found), params, inputs[:4]), expected)
        assert not inputs[4:].any()


@SIZES
def test_two_devices_are_as_one(size):
    with jax.enable_x64(True):
        student, teacher = pair(6, size, normal(0))
        rows, variables = batch(6, (1, 1, 1, 1, 1, 0)), variables_of(size)

        def split(x):
            return x.reshape(2, 3, *x.shape[1:])

        def total(params, student):
            def one(student, teacher, mask):
                local = batch(3).replace(mask=mask)
                return loss_of(head_of("devices"), variables, params, student, teacher, local)

            by_device = [x.replace(classifier=None).map_rows(split) for x in (student, teacher)]
            found = jax.vmap(one, axis_name="devices")(*by_device, split(rows.mask))
            loss, logits = (x.reshape(6, *x.shape[2:]) for x in found)
            return (loss * rows.mask).sum(), (loss, logits)

        expected = loss_and_gradients(variables, student, teacher, rows)
        call = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        (params, inputs), found = call(variables["params"], student)
        assert_close([x[:5] for x in found], [x[:5] for x in expected[0]])
        assert_close((params["projector"], inputs.features[-1]), expected[1:])


kinds = st.sampled_from(("zero", "constant", "identical", "sparse", "huge", "tiny", "normal"))


@settings(max_examples=15)
@given(kinds, kinds, st.sampled_from([(1, "float32"), (3, "bfloat16")]))
def test_degenerate_maps_are_finite(student_kind, teacher_kind, rows_and_dtype):
    rows, dtype = rows_and_dtype
    rng = np.random.default_rng(0)
    makes = (
        lambda shape, kind=kind: jnp.asarray(KINDS[kind](rng, shape), dtype)
        for kind in (student_kind, teacher_kind)
    )
    (loss, logits), *grads = loss_and_gradients(
        variables_of(4), *pair(rows, 4, *makes), batch(rows)
    )
    assert loss.shape == (rows,) and loss.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, logits, grads)))


@pytest.mark.parametrize(
    ("name", "field"),
    [("wrn_16_2", "pre_pool"), ("ShuffleV2", "features"), ("MobileNetV2", "features")],
)
def test_which_map_is_projected(name, field):
    """The last tap, but not that of a WRN, which comes before its last BatchNorm and ReLU."""
    network = models.create(name, 3)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    seen = jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], image)
    taps = {"features": seen.features[-1], "pre_pool": seen.pre_pool}
    assert last_map(seen) is taps[field]


def test_parameters_of_the_projector():
    """s m + 9 m^2 + m t + 4 m + 2 t, for s = t = 256 channels and m = 128."""
    student, teacher = (network_outputs(name) for name in ("resnet8x4", "resnet32x4"))
    found = extra_parameters(TERM, student, teacher, 50_000)
    assert found == {"projector": 214_016, "classifier": 25_700}
