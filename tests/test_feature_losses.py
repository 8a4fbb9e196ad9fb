"""Losses of maps and of adjusted or decoupled logits: closed forms, extreme inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from ipwd_jax.losses.ab import AB, ab_loss
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.dkd import DKD, dkd_loss
from ipwd_jax.losses.fsp import FSP, fsp_loss
from ipwd_jax.losses.ft import FT
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.losses.la import KDLA, kd_la_loss
from ipwd_jax.losses.ofd import OFD, ofd_distance, ofd_margin
from ipwd_jax.losses.reviewkd import ABF, ReviewKD, hcl_loss, nearest_resize
from ipwd_jax.models.base import Outputs

KEY = jax.random.key(0)
# (H, W, C) of the maps, stem first, and the length of the embedding. Sizes and channels differ so
# that every kind of connector occurs.
STUDENT = (((8, 8, 2), (8, 8, 2), (4, 4, 3), (2, 2, 4)), 4)
TEACHER = (((8, 8, 2), (8, 8, 3), (8, 8, 3), (2, 2, 4)), 5)
SAME = (((8, 8, 2), (8, 8, 2), (4, 4, 3), (2, 2, 4)), 4)
# Two maps less, for what is slow to compile.
SHORT_STUDENT, SHORT_TEACHER = (((8, 8, 2), (4, 4, 3)), 4), (((8, 8, 2), (8, 8, 3)), 5)


def outputs(shapes, rows, make=jnp.zeros, classes=5):
    maps, width = shapes
    features = tuple(make((rows, *shape)) for shape in maps)
    return Outputs(
        logits=make((rows, classes)),
        embedding=make((rows, width)),
        features=features,
        preact=(features[0], *(make((rows, *shape)) for shape in maps[1:])),
    )


def random_outputs(shapes, rows, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return outputs(shapes, rows, lambda shape: jnp.asarray(scale * rng.standard_normal(shape)))


def batch(rows, epoch=0, mask=None):
    index = jnp.arange(rows, dtype=jnp.int32)
    return Batch(
        image=jnp.zeros((rows, 1, 1, 1)),
        label=index % 5,
        index=index,
        view=index,
        mask=jnp.ones(rows) if mask is None else jnp.asarray(mask, jnp.float32),
        epoch=jnp.int32(epoch),
        train_labels=index % 5,
        key=KEY,
    )


def init(term, student, teacher):
    """Variables of the term; drawn by NumPy, since the draws of many shapes compile slowly."""
    shapes = jax.eval_shape(term.init, KEY, student, teacher, batch(len(student.logits)))
    rng = np.random.default_rng(0)

    def draw(path, x):
        ones = path[-1].key in ("scale", "var")
        return jnp.asarray(
            np.ones(x.shape) if ones else 0.3 * rng.standard_normal(x.shape), x.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=("term", "method"))
def value(term, variables, student, teacher, rows, method=None):
    mutable = ["batch_stats", "memory"]
    return term.apply(variables, student, teacher, rows, mutable=mutable, method=method)[0]


# By name: the term and the shapes of the student and the teacher.
TERMS = {
    "dkd": (DKD(), STUDENT, TEACHER),
    "reviewkd": (ReviewKD(), SHORT_STUDENT, SHORT_TEACHER),
    "ab": (AB(), STUDENT, TEACHER),
    "fsp": (FSP(), STUDENT, SAME),
    "ft": (FT(), STUDENT, TEACHER),
    "ofd": (OFD(), STUDENT, TEACHER),
    "kd_la": (KDLA(class_prior=(0.5, 0.3, 0.1, 0.1, 0.0)), STUDENT, TEACHER),
}


@functools.cache
def loss_and_gradient(name, rows, dtype, method=None):
    """The term's variables and its compiled value and gradient."""
    term, *shapes = TERMS[name]
    zeros = [outputs(s, rows, lambda shape: jnp.zeros(shape, dtype)) for s in shapes]
    variables = init(term, *zeros)

    def mean(params, student, teacher):
        values = value(term, variables | {"params": params}, student, teacher, batch(rows), method)
        return values.mean(), values

    function = jax.jit(jax.value_and_grad(mean, argnums=(0, 1), has_aux=True))
    return lambda *taps: function(variables.get("params", {}), *taps)


def check_finite(name, student, teacher, rows, dtype, method=None):
    (_, values), grads = loss_and_gradient(name, rows, dtype, method)(student, teacher)
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
@settings(max_examples=20, deadline=None)
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


class TestDKD:
    def logits(self):
        return [3 * jax.random.normal(jax.random.key(i), (6, 5)) for i in (1, 2)]

    def test_its_two_parts_make_up_kd(self):
        student, teacher = self.logits()
        labels = jnp.array([0, 1, 2, 3, 4, 0])
        tckd = dkd_loss(student, teacher, labels, 1.0, 0.0)
        nckd = dkd_loss(student, teacher, labels, 0.0, 1.0)
        target = jax.nn.softmax(teacher / 4)[jnp.arange(6), labels]
        np.testing.assert_allclose(
            tckd + (1 - target) * nckd, kd_loss(student, teacher, 4.0), rtol=1e-4
        )

    def test_the_second_part_does_not_see_the_target(self):
        student, teacher = self.logits()
        labels = jnp.array([0, 1, 2, 3, 4, 0])
        moved = student.at[jnp.arange(6), labels].add(7.0)
        values = [dkd_loss(x, teacher, labels, alpha=0.0) for x in (student, moved)]
        np.testing.assert_allclose(*values, rtol=1e-5)

    def test_a_certain_answer_is_finite(self):
        logits = jnp.full((1, 5), -1e4).at[0, 0].set(1e4)
        for label in (0, 1):
            args = (jnp.zeros((1, 5)), jnp.array([label]))
            assert np.isfinite(dkd_loss(logits, *args)).all()
            assert np.isfinite(jax.grad(lambda x, a=args: dkd_loss(x, *a).sum())(logits)).all()

    @pytest.mark.parametrize(("epoch", "factor"), [(0, 0.05), (9, 0.5), (19, 1), (200, 1)])
    def test_warmup_counts_from_one(self, epoch, factor):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        full = DKD(warmup=1).apply({}, student, teacher, batch(3))
        np.testing.assert_allclose(
            DKD().apply({}, student, teacher, batch(3, epoch)), factor * full, rtol=1e-5
        )


class TestReviewKD:
    @pytest.mark.parametrize("sizes", [(1, 4), (4, 8), (5, 5), (3, 7), (7, 3), (8, 4)])
    def test_nearest_resize(self, sizes):
        old, new = sizes
        x = jax.random.normal(KEY, (2, old, old + 1, 3))
        resized = nearest_resize(x, new, new)
        for i in range(new):
            for j in range(new):
                source = x[:, int(i * old / new), int(j * (old + 1) / new)]
                assert np.array_equal(resized[:, i, j], source)

    def test_hcl_of_constant_difference_is_its_square(self):
        maps = [jnp.zeros((2, size, size, 3)) for size in (8, 4, 2, 1)]
        np.testing.assert_allclose(hcl_loss(maps, [x + 3 for x in maps]), 4 * 9, rtol=1e-5)

    def test_hcl_weighs_the_pooled_maps(self):
        difference = np.zeros((1, 2, 2, 1))
        difference[0, 0, 0, 0] = 4
        expected = (16 / 4 + 0.5 * 1) / 1.5
        loss = hcl_loss([jnp.asarray(difference)], [jnp.zeros((1, 2, 2, 1))])
        np.testing.assert_allclose(loss, [expected], rtol=1e-6)

    @pytest.mark.parametrize("first_epoch", [0, 1])
    def test_warmup(self, first_epoch):
        student, teacher = random_outputs(SHORT_STUDENT, 3, 1), random_outputs(SHORT_TEACHER, 3, 2)
        term = ReviewKD(first_epoch=first_epoch)
        variables = init(term, student, teacher)
        full = value(term, variables, student, teacher, batch(3, 20))
        for epoch in (0, 10, 19, 30):
            found = value(term, variables, student, teacher, batch(3, epoch))
            factor = min((epoch + first_epoch) / 20, 1)
            np.testing.assert_allclose(found, factor * full, rtol=1e-5)

    def test_unequal_levels_are_an_error(self):
        maps, width = STUDENT
        shallow = outputs((maps[1:], width), 2)
        with pytest.raises(ValueError, match="student has 3 and the teacher 4"):
            ReviewKD().init(KEY, shallow, outputs(TEACHER, 2), batch(2))

    def test_maps_before_the_activation_and_narrow_fusion(self):
        student, teacher = random_outputs(SHORT_STUDENT, 3, 1), random_outputs(SHORT_TEACHER, 3, 2)
        term = ReviewKD(student_preact=True, mid_channels=3)
        variables = init(term, student, teacher)
        moved = student.replace(features=tuple(x + 1 for x in student.features))
        found = [value(term, variables, s, teacher, batch(3)) for s in (student, moved)]
        assert np.array_equal(*found)
        shapes = jax.tree.map(jnp.shape, variables["params"])
        assert shapes["1"]["conv2.0"]["kernel"] == (3, 3, 3, 3)

    def test_first_kernels_are_kaiming_uniform(self):
        x = jnp.zeros((2, 1, 1, 300))
        variables = jax.jit(lambda: ABF(20, 3).init(KEY, x, None, (1, 1), jnp.ones(2)))()
        bound = np.sqrt(3 / 300)
        largest = np.abs(variables["params"]["conv1.0"]["kernel"]).max()
        assert 0.99 * bound < largest <= bound


def test_ab_counts_only_neurons_on_the_wrong_side_of_the_margin():
    student = np.array([-2.0, -0.5, 0.5, 2.0, -2.0, -0.5, 0.5, 2.0]).reshape(1, 2, 2, 2)
    teacher = np.array([-1.0, -1.0, 0.0, -1.0, 1.0, 1.0, 1.0, 1.0]).reshape(1, 2, 2, 2)
    one_map = (0.5**2 + 1.5**2 + 3**2) + (3**2 + 1.5**2 + 0.5**2)
    maps = [[jnp.asarray(x)] * 3 for x in (student, teacher)]
    expected = one_map * (1 + 1 / 2 + 1 / 4) * 3 / 1000
    np.testing.assert_allclose(ab_loss(*maps), [expected], rtol=1e-6)


class TestFSP:
    def test_against_loops(self):
        student, teacher = (random_outputs(SAME, 2, seed).features for seed in (1, 2))

        def pooled(x, size):
            k = x.shape[0] // size
            return x.reshape(size, k, size, k, -1).mean(axis=(1, 3))

        def matrix(a, b):
            size = min(len(a), len(b))
            a, b = (pooled(x, size).reshape(size * size, -1) for x in (a, b))
            return sum(np.outer(x, y) for x, y in zip(a, b, strict=True)) / size**2

        expected = np.zeros(2)
        for row in range(2):
            for k in range(3):
                s, t = (
                    matrix(*(np.asarray(x[row]) for x in maps[k : k + 2]))
                    for maps in (student, teacher)
                )
                expected[row] += ((s - t) ** 2).mean()
        np.testing.assert_allclose(fsp_loss(student, teacher), expected, rtol=1e-4)

    def test_equal_networks_have_no_loss(self):
        maps = random_outputs(SAME, 2, 1).features
        assert np.array_equal(fsp_loss(maps, maps), np.zeros(2))

    def test_unequal_channels_are_an_error(self):
        maps = [outputs(s, 2).features for s in (STUDENT, TEACHER)]
        with pytest.raises(ValueError, match=r"\[2, 2, 3, 4\].*\[2, 3, 3, 4\]"):
            fsp_loss(*maps)


class TestFT:
    def gradients(self, method=None):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        variables = init(FT(), student, teacher)

        def mean(params):
            given = variables | {"params": params}
            return value(FT(), given, student, teacher, batch(3), method).mean()

        grads = jax.grad(mean)(variables["params"])
        return {k: [bool(np.any(g)) for g in jax.tree.leaves(v)] for k, v in grads.items()}

    def test_the_call_trains_the_translator_alone(self):
        moved = self.gradients()
        assert any(moved["translator"]) and not any(moved["paraphraser"])

    def test_the_first_stage_trains_the_paraphraser_alone(self):
        moved = self.gradients("pretrain")
        assert all(moved["paraphraser"]) and not any(moved["translator"])
        assert set(moved) - {"translator"} == set(FT.first_stage_params)


class TestOFD:
    @given(st.floats(0.05, 3), st.floats(-3, 3), st.booleans())
    @settings(max_examples=50, deadline=None)
    def test_margin_is_the_mean_of_the_negative_part(self, spread, mean, flipped):
        tail = stats.norm.cdf(0, mean, spread)
        moment, _ = integrate.quad(
            lambda x: x * stats.norm.pdf(x, mean, spread), min(mean, 0) - 12 * spread, 0,
            points=[min(mean, 0) - spread], limit=200,
        )  # fmt: skip
        if abs(tail - 0.001) < 1e-6:
            return
        expected = moment / tail if tail > 0.001 else -3 * spread
        with jax.enable_x64(True):
            scale = jnp.asarray([-spread if flipped else spread], jnp.float64)
            margin = ofd_margin(scale, jnp.asarray([mean], jnp.float64))
        np.testing.assert_allclose(margin, [expected], rtol=1e-7)

    def test_channels_without_spread(self):
        margin = ofd_margin(jnp.zeros(3), jnp.array([-2.0, 0.0, 2.0]))
        np.testing.assert_allclose(margin, [-2, 0, 0])

    def test_distance_against_loops(self):
        rng = np.random.default_rng(0)
        s, t = rng.normal(size=(2, 2, 3, 3, 4))
        margin = -np.abs(rng.normal(size=4))
        expected = np.zeros(2)
        for row, i, j, c in np.ndindex(s.shape):
            x, y, m = s[row, i, j, c], t[row, i, j, c], margin[c]
            if y > 0 or (m < y <= 0 and x > y):
                expected[row] += (x - y) ** 2
            elif y <= m and x > m:
                expected[row] += (x - m) ** 2
        found = ofd_distance(*(jnp.asarray(x, jnp.float32) for x in (s, t, margin)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_margins_of_the_teacher(self):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        channels = [shape[-1] for shape in TEACHER[0][1:]]
        norms = {scale: tuple(((scale,) * c, (0.0,) * c) for c in channels) for scale in (1.0, 2.0)}
        variables = init(OFD(), student, teacher)
        default, same, other = (
            value(OFD(preact_norms=given), variables, student, teacher, batch(3))
            for given in ((), norms[1.0], norms[2.0])
        )
        assert np.array_equal(default, same) and not np.allclose(default, other)
        with pytest.raises(ValueError, match="preact_norms"):
            value(OFD(preact_norms=norms[1.0][1:]), variables, student, teacher, batch(3))


class TestKDLA:
    @pytest.mark.parametrize("after", [False, True])
    def test_against_numpy(self, after):
        student, teacher = np.random.default_rng(0).normal(size=(2, 4, 5))
        prior, tau, temperature = np.array([0.4, 0.3, 0.1, 0.1, 0.1]), 0.5, 3.0

        def softmax(z):
            return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

        adjustment = tau * np.log(prior)
        p = softmax(teacher / temperature)
        if after:
            q = softmax(student / temperature + adjustment)
        else:
            q = softmax((student + adjustment) / temperature)
        expected = temperature**2 * (p * np.log(p / q)).sum(axis=1)
        found = kd_la_loss(
            jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), tuple(prior),
            temperature, tau, after,
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_uniform_prior_is_kd(self):
        student, teacher = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        expected = kd_loss(student.logits, teacher.logits, 4.0)
        for prior in ((), (0.2,) * 5):
            found = KDLA(class_prior=prior).apply({}, student, teacher, batch(3))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
