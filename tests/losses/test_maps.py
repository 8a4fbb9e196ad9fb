"""Terms that read the map before the pooling, the last map, or the classifiers."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_helpers import KINDS, assert_close, batch, init, normal, value

from ipwd_jax import config as config_lib
from ipwd_jax import data, losses, models
from ipwd_jax.assemble import assemble
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import late_decay
from ipwd_jax.losses.cat_kd import CATKD, class_activation_maps
from ipwd_jax.losses.sdd import SDD
from ipwd_jax.losses.srrl import SRRL
from ipwd_jax.losses.wkd import WKDFeatures, WKDLogits, cell_statistics, wasserstein
from ipwd_jax.models.base import Outputs
from ipwd_jax.step import ask_teacher
from ipwd_jax.teacher import from_variables

CLASSES = 5
TERMS = {
    "srrl": SRRL(),
    "srrl_map": SRRL("map"),
    "cat_kd": CATKD(),
    "cat_kd_norm": CATKD(3, True),
    "sdd_kd": SDD("kd"),
    "sdd_dkd": SDD(),
    "sdd_nkd": SDD("nkd", scales=(1, 2)),
    "wkd_l": WKDLogits(decay_from=0, epochs=4),
    "wkd_f": WKDFeatures(grid=2, decay_from=0, epochs=4),
}
NAMES = pytest.mark.parametrize("name", TERMS)


def outputs(shape, rows, make):
    """Return `Outputs` with a last map of this shape (H, W, D); `make` makes each array."""
    width = shape[-1]
    logits, embedding = make((rows, CLASSES)), make((rows, width))
    last, pre_pool = make((rows, *shape)), make((rows, *shape))
    classifier = make((width, CLASSES)), make((CLASSES,))
    return Outputs(logits, embedding, (last,), (last,), pre_pool=pre_pool, classifier=classifier)


# The teacher's map is twice as high as the student's.
STUDENT, TEACHER = (2, 2, 3), (4, 4, 6)


def pair(rows, make=None, teacher_make=None):
    make = make or normal(0)
    return outputs(STUDENT, rows, make), outputs(TEACHER, rows, teacher_make or make)


@functools.cache
def variables_of(name):
    return init(TERMS[name], *pair(2))


@functools.cache
def loss_and_gradients(name):
    """Return a compiled function of each sample's loss and of the gradients of the sum.

    The gradients are with respect to the parameters and to the student's outputs.
    """
    term, variables = TERMS[name], variables_of(name)

    def total(params, student, teacher, rows):
        loss = value(term, {**variables, "params": params}, student, teacher, rows)
        return (loss * rows.mask.astype(loss.dtype)).sum(), loss

    def call(student, teacher, rows):
        params = variables.get("params", {})
        grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
        (_, loss), grads = grad(params, student, teacher, rows)
        return loss, grads

    return jax.jit(call)


@NAMES
def test_padding_changes_nothing(name):
    with jax.enable_x64(True):
        student, teacher = pair(4)
        noise = normal(5, 1e3)
        padded = [
            x.map_rows(lambda rows: np.concatenate([rows, noise((2, *rows.shape[1:]))]))
            for x in (student, teacher)
        ]
        call = loss_and_gradients(name)
        loss, (params, inputs) = call(student, teacher, batch(4, epoch=1))
        rows = batch(6, (1, 1, 1, 1, 0, 0), epoch=1)
        found, (found_params, found_inputs) = call(*padded, rows)
        np.testing.assert_allclose(found[:4], loss, rtol=1e-9)
        if params:
            assert_close(found_params, params)
        assert_close(found_inputs.map_rows(lambda x: x[:4]), inputs)
        of_padding = found_inputs.map_rows(lambda x: x[4:]).replace(classifier=None)
        assert not any(np.any(x) for x in jax.tree.leaves(of_padding))


@NAMES
def test_two_devices_are_as_one(name):
    """Losses and gradients are those of one global batch, of which some rows are padding."""
    with jax.enable_x64(True):
        student, teacher = pair(6)
        rows = batch(6, (1, 1, 1, 1, 1, 0), epoch=1)
        term, variables = TERMS[name], variables_of(name)
        spread = term.clone(axis_name="devices") if hasattr(term, "axis_name") else term

        def split(rows):
            return rows.reshape(2, 3, *rows.shape[1:])

        def total(params, student):
            def one(student, teacher, mask, label):
                student = student.replace(classifier=of_student)
                teacher = teacher.replace(classifier=of_teacher)
                local = batch(3, epoch=1).replace(mask=mask, label=label)
                given = {**variables, "params": params}
                return value(spread, given, student, teacher, local)

            of_student, of_teacher = student.classifier, teacher.classifier
            by_device = [x.replace(classifier=None).map_rows(split) for x in (student, teacher)]
            devices = jax.vmap(one, axis_name="devices")
            loss = devices(*by_device, split(rows.mask), split(rows.label)).reshape(6)
            return (loss * rows.mask.astype(loss.dtype)).sum(), loss

        expected, expected_grads = loss_and_gradients(name)(student, teacher, rows)
        call = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        grads, loss = call(variables.get("params", {}), student)
        np.testing.assert_allclose(loss[:5], expected[:5], rtol=1e-9)
        assert_close(grads[1], expected_grads[1])
        if expected_grads[0]:
            assert_close(grads[0], expected_grads[0])


kinds = st.sampled_from(("zero", "constant", "identical", "sparse", "huge", "tiny", "normal"))


@NAMES
@settings(max_examples=15)
@given(kinds, kinds, st.sampled_from([(1, "float32"), (3, "bfloat16")]))
def test_degenerate_inputs_are_finite(name, student_kind, teacher_kind, rows_and_dtype):
    rows, dtype = rows_and_dtype
    rng = np.random.default_rng(0)

    def make(kind):
        return lambda shape: jnp.asarray(KINDS[kind](rng, shape), dtype)

    seen = pair(rows, make(student_kind), make(teacher_kind))
    loss, grads = loss_and_gradients(name)(*seen, batch(rows, epoch=1))
    assert loss.shape == (rows,) and loss.dtype == jnp.float32
    for x in jax.tree.leaves((loss, grads)):
        assert np.isfinite(np.asarray(x, np.float32)).all()


# Wrong settings and networks


@pytest.mark.parametrize("field", ["pre_pool", "classifier"])
def test_a_network_without_the_tap_is_refused(field):
    student, teacher = pair(2)
    with pytest.raises(ValueError, match=f"reads `{field}`, which the `Outputs` of a network lack"):
        value(CATKD(), {}, student, teacher.replace(**{field: None}), batch(2))


def test_wrong_regions_and_cells_are_refused():
    with pytest.raises(ValueError, match="must begin with 1"):
        value(SDD(scales=(2, 4)), {}, *pair(2), batch(2))
    for grid in (3, 4):
        with pytest.raises(ValueError, match=r"does not divide .* 4x4 pixels into equal cells"):
            cell_statistics(jnp.zeros((2, 4, 4, 3)), grid)


# Parts


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "tiny_net"])
def test_class_activation_maps_of_one_cell_are_the_logits_without_the_bias(name):
    network = models.create(name, 7)
    images = normal(0)((2, 8, 8, 3)).astype(np.float32)
    outputs, _ = jax.jit(network.init_with_output)(jax.random.key(0), images)
    kernel, bias = outputs.classifier
    found = class_activation_maps(outputs.pre_pool, kernel, 1)[:, 0] + bias[None]
    np.testing.assert_allclose(found, outputs.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cat_kd", "sdd_dkd"])
def test_the_gradient_reaches_the_classifier_of_the_student(name):
    network = models.create("tiny_net", CLASSES)
    images = normal(0)((3, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(network.init)(jax.random.key(0), images)
    _, teacher = pair(3)

    @jax.jit
    def loss(params):
        student = network.apply({**variables, "params": params}, images)
        return value(TERMS[name], {}, student, teacher, batch(3, epoch=1)).mean()

    kernel = variables["params"]["fc"]["kernel"]
    gradient = jax.grad(loss)(variables["params"])["fc"]["kernel"]
    step = 1e-2 * normal(1)(kernel.shape).astype(np.float32)

    def at(sign):
        shifted = {**variables["params"]["fc"], "kernel": kernel + sign * step}
        return loss({**variables["params"], "fc": shifted})

    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose((at(1) - at(-1)) / 2, (gradient * step).sum(), rtol=1e-2)


def test_late_decay():
    """The factor in epoch e > 150 is (1 + cos(pi (e - 150) / 90)) / 2, with e counted from 1."""
    for epoch, factor in ((0, 1), (149, 1), (179, 0.75), (194, 0.5), (239, 0)):
        np.testing.assert_allclose(late_decay(jnp.int32(epoch), 150, 240), factor, atol=1e-6)
    assert late_decay(jnp.int32(1), 150, 2) == 1


def test_wasserstein_distance_of_equal_and_of_distant_predictions():
    """Between point masses, the plan is unique, so the distance is the cost."""
    cost = np.abs(np.subtract.outer(np.arange(5.0), np.arange(5.0))).astype(np.float32) / 10
    at = 50 * np.eye(5, dtype=np.float32)
    labels = jnp.array([0, 0])
    found = wasserstein(at[jnp.array([1, 1])], at[jnp.array([1, 4])], labels, cost, 1.0)
    np.testing.assert_allclose(found, [0, 0.3], atol=1e-5)


# Distances between classes


@functools.cache
def asked():
    """Return an untrained teacher of twelve images, three of the first two classes each."""
    config = config_lib.default()
    config.teacher.name = "tiny_net"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    labels = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 2, 2])
    dataset = data.from_arrays(images, labels, images[:3], labels[:3])
    network = models.create("tiny_net", 3)
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    return from_variables(config, variables, dataset)


def linear_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.square(np.linalg.norm(y.T @ x)) / norms


def test_cka_of_the_last_maps():
    teacher = asked()
    train = teacher.dataset.train
    pixels = (train.images / 255 - teacher.dataset.mean) / teacher.dataset.std
    outputs = teacher.network.apply(teacher.variables, pixels.astype(np.float32))
    maps = np.asarray(outputs.features[-1], np.float64)
    of_class = [maps[train.labels == c][:3].reshape(-1, maps.shape[-1]) for c in range(3)]
    expected = [[1 - linear_cka(x, y) for x in of_class] for y in of_class]
    np.testing.assert_allclose(teacher.class_distances("cka"), expected, atol=1e-5)


def test_cosines_of_the_classifier():
    teacher = asked()
    kernel = np.asarray(teacher.variables["params"]["fc"]["kernel"])
    expected = [
        [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in kernel.T] for b in kernel.T
    ]
    np.testing.assert_allclose(teacher.class_distances("classifier"), expected, atol=1e-6)
    term = losses.TERMS["wkd_l"](distances="classifier").of_teacher(teacher)
    np.testing.assert_allclose(term.class_distances, expected, atol=1e-6)


def test_cka_of_a_class_without_images_is_refused():
    teacher = asked()
    lonely = dataclasses.replace(teacher.dataset, class_names=("a", "b", "c", "d"))
    with pytest.raises(UserError, match="no training image of the class 'd'"):
        dataclasses.replace(teacher, dataset=lonely).class_distances("cka")


def test_cka_is_computed_once_for_a_teacher_with_a_folder(tmp_path):
    teacher = dataclasses.replace(asked(), workdir=tmp_path)
    teacher.class_distances("cka")
    assert not list(tmp_path.iterdir())  # this is no finished run
    (tmp_path / "result.json").write_text("{}")
    expected = teacher.class_distances("cka")
    (file,) = tmp_path.glob("class_cka_*.npz")
    np.testing.assert_array_equal(np.load(file)["distances"], expected)
    np.savez(file, distances=2 * expected)
    np.testing.assert_array_equal(teacher.class_distances("cka"), 2 * expected)


# What the step asks of the teacher


@pytest.mark.parametrize(
    ("term", "read"),
    [("kd", set()), ("srrl", {"classifier"}), ("cat_kd", {"pre_pool", "classifier"})],
)
def test_taps_that_nothing_reads_are_not_kept(term, read, squares):
    config = helpers.settings(weighting__name="uniform")
    config.loss.update({"kd": 0.0, "cls": 0.0, term: 1.0})
    variables = models.create("tiny_net", 2).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    teacher = from_variables(config, variables, squares)
    spec, images = assemble(config, squares, teacher).step_spec(0), jnp.zeros((3, 8, 8, 1))
    found = jax.eval_shape(lambda: ask_teacher(spec, teacher.inputs, images, batch(3)))
    optional = ("features", "preact", "pre_pool", "classifier")
    assert {name for name in optional if getattr(found, name) not in (None, ())} == read
