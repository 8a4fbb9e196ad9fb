"""Per-sample weights: closed forms, invariances, extreme logits, and heads that are certain."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import CLS_LOGITS, KD_LOGITS, KINDS, LABELS, TRAIN_LABELS, batch

from ipwd_jax import config as config_lib
from ipwd_jax import losses
from ipwd_jax.losses.base import cross_entropy
from ipwd_jax.losses.kd import KD, KDHead
from ipwd_jax.losses.weighting import (
    init_memory,
    ipwd_scores,
    ipwd_weights,
    surprise,
    weigh,
    wsld_weights,
)
from ipwd_jax.models.base import Outputs


def outputs(logits, **extra):
    """Return `Outputs` with the logits of the classifier and of the extra heads."""
    return Outputs(
        logits=jnp.asarray(logits, jnp.float32),
        embedding=jnp.zeros((len(logits), 3)),
        features=(),
        preact=(),
        extra_logits={name: jnp.asarray(x, jnp.float32) for name, x in extra.items()},
    )


def batch_of_four(index=(0, 1, 2, 3), mask=(1, 1, 1, 1), epoch=0):
    """Return the four samples whose logits are `KD_LOGITS` and `CLS_LOGITS`."""
    return batch(4, mask, epoch, LABELS).replace(index=jnp.array(index))


def weighting(**settings):
    """Return `config.weighting` with these settings."""
    config = config_lib.default().weighting
    config.update(settings)
    return config


def ipwd(batch_, memory=None, **settings):
    """Return the weights of the four samples and the memory after them."""
    config = weighting(name="ipwd", **settings)
    memory = init_memory(config, 6) if memory is None else memory
    return weigh(config, outputs(KD_LOGITS, cls=CLS_LOGITS), None, batch_, memory)


class TestIpwd:
    H_KD = (2.112542, 3.411588, 4.005581, 4.224620)
    H_CLS = (1.408983, 1.428232, 1.089967, 3.327865)
    A = (2.499338, 3.388679, 4.674957, 2.269469)
    B = (1.666961, 1.418641, 1.272112, 1.787731)

    def test_published_arithmetic(self):
        with jax.enable_x64(True):
            h_kd, h_cls = ipwd_scores(jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS), LABELS)
            np.testing.assert_allclose(h_kd, self.H_KD, rtol=3e-6)
            np.testing.assert_allclose(h_cls, self.H_CLS, rtol=3e-6)
            np.testing.assert_allclose(ipwd_weights(h_kd, h_cls, "A"), self.A, rtol=3e-6)
            np.testing.assert_allclose(ipwd_weights(h_kd, h_cls, "B"), self.B, rtol=3e-6)

    @pytest.mark.parametrize("ratio", ["A", "B"])
    def test_ratio(self, ratio):
        weights, memory = ipwd(batch_of_four(), ratio=ratio)
        np.testing.assert_allclose(weights, getattr(self, ratio), rtol=1e-5)
        np.testing.assert_allclose(memory["h_kd"], [*self.H_KD, 0, 0], rtol=1e-5)
        np.testing.assert_allclose(memory["h_cls"], [*self.H_CLS, 0, 0], rtol=1e-5)
        np.testing.assert_allclose(memory["weight"], [*getattr(self, ratio), 0, 0], rtol=1e-5)

    def test_the_distilled_head_of_ipwd_dagger(self):
        config = weighting(name="ipwd", kd_source="head")
        student = outputs(CLS_LOGITS + 1, cls=CLS_LOGITS, kd=KD_LOGITS)
        weights, _ = weigh(config, student, None, batch_of_four(), init_memory(config, 4))
        np.testing.assert_allclose(weights, self.A, rtol=1e-5)
        found = KDHead()(student, outputs(KD_LOGITS[::-1]), batch_of_four())
        expected = KD()(outputs(KD_LOGITS), outputs(KD_LOGITS[::-1]), batch_of_four())
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_scale_and_shift_of_a_head_matter_only_without_standardisation(self):
        moved = 5 * CLS_LOGITS + 2
        for standardize in (True, False):
            scores = [
                ipwd_scores(jnp.asarray(KD_LOGITS), jnp.asarray(x), LABELS, standardize)[1]
                for x in (CLS_LOGITS, moved)
            ]
            assert np.allclose(*scores, rtol=1e-5) == standardize

    def test_heads_that_agree_weigh_two(self):
        h = jnp.array([0.5, 1.0, 4.0])
        np.testing.assert_allclose(ipwd_weights(h, h), 2, rtol=1e-6)

    def test_no_gradient(self):
        def total(kd, cls):
            config = weighting(name="ipwd")
            student = outputs(KD_LOGITS).replace(logits=kd, extra_logits={"cls": cls})
            return weigh(config, student, None, batch_of_four(), init_memory(config, 4))[0].sum()

        grads = jax.grad(total, argnums=(0, 1))(jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS))
        assert not any(np.any(g) for g in grads)

    def test_clip(self):
        np.testing.assert_allclose(
            ipwd(batch_of_four(), clip=3.0)[0], np.minimum(self.A, 3.0), rtol=1e-5
        )

    def test_batch_normalisation_leaves_out_padding(self):
        weights, memory = ipwd(batch_of_four(mask=(1, 1, 1, 0)), batch_normalize=True)
        np.testing.assert_allclose(weights, self.A / np.mean(self.A[:3]), rtol=1e-5)
        assert memory["weight"][3] == 0, "a padding row was remembered"

    def test_start_epoch(self):
        assert np.array_equal(ipwd(batch_of_four(epoch=1), start_epoch=2)[0], np.ones(4))
        np.testing.assert_allclose(
            ipwd(batch_of_four(epoch=2), start_epoch=2)[0], self.A, rtol=1e-5
        )

    def test_running_mean_over_visits(self):
        first, memory = ipwd(batch_of_four(), average=0.75)
        np.testing.assert_allclose(first, self.A, rtol=1e-5)
        second, memory = ipwd(batch_of_four(index=(1, 0, 2, 3)), memory, average=0.75)
        previous = np.array(self.A)[[1, 0, 2, 3]]
        np.testing.assert_allclose(second, 0.75 * previous + 0.25 * np.array(self.A), rtol=1e-5)

    def test_extreme_and_constant_logits_are_finite(self):
        for logits in (np.zeros((4, 10)), 1e4 * KD_LOGITS, -1e4 * KD_LOGITS):
            h_kd, h_cls = ipwd_scores(
                jnp.asarray(logits, jnp.float32), jnp.asarray(logits, jnp.float32), LABELS
            )
            assert np.isfinite(ipwd_weights(h_kd, h_cls)).all()


def test_uniform_and_constant_weights():
    student = outputs(KD_LOGITS)
    weights, memory = weigh(weighting(), student, None, batch_of_four(), {})
    assert np.array_equal(weights, np.ones(4)) and memory == {}
    config = weighting(name="constant", constant=2.5)
    weights, memory = weigh(config, student, None, batch_of_four(), init_memory(config, 5))
    assert np.array_equal(weights, np.full(4, 2.5))
    assert np.array_equal(memory["weight"], [2.5, 2.5, 2.5, 2.5, 0])


@pytest.mark.parametrize(
    ("field", "default", "clashes"),
    [("clip", 0.0, True), ("constant", 2.0, True), ("constant", 1.0, False), ("power", 2.0, False)],
)
def test_a_field_cannot_take_the_name_of_another_setting(monkeypatch, field, default, clashes):
    """Nor of another weighting's field, unless both have the same default."""
    mine = dataclasses.make_dataclass(
        "Mine", [(field, float, default)], bases=(losses.weighting.Constant,), frozen=True
    )
    monkeypatch.setitem(losses.weighting.WEIGHTINGS, "mine", mine)
    if clashes:
        with pytest.raises(ValueError, match=f"'{field}' of the weighting 'mine' clashes with"):
            losses.weighting.settings()
    else:
        assert losses.weighting.settings()[field] == default


def test_each_weighting_names_what_it_asks_for():
    config, heads_of_terms = config_lib.default(), {"cls", "kd"}
    fields = {field.name for field in dataclasses.fields(Outputs)}
    for name, kind in losses.WEIGHTINGS.items():
        config.weighting.name = name
        instance = losses.weighting.create(config.weighting)
        assert instance == kind() and set(kind.teacher_taps) <= fields
        assert set(instance.heads()) <= heads_of_terms and all(instance.heads().values())
        memory = init_memory(config.weighting, 3)
        assert set(memory) == ({"weight", *kind.memory} if kind.weighs else set())
    assert losses.WEIGHTINGS["ipwd"](kd_source="head").heads().keys() == heads_of_terms


@pytest.mark.parametrize("kind", ["zero", "identical", "large", "normal"])
def test_weights_are_finite_and_above_one(kind):
    rng = np.random.default_rng(0)
    logits = [jnp.asarray(KINDS[kind](rng, (3, 5)), jnp.float32) for _ in range(2)]
    for standardize in (True, False):
        scores = ipwd_scores(*logits, TRAIN_LABELS[:3], standardize)
        weights = ipwd_weights(*scores)
        assert np.isfinite(weights).all() and (weights >= 1).all()
    assert np.isfinite(cross_entropy(logits[0], TRAIN_LABELS[:3])).all()


def confident(classes, label, margin=1.0, other=0):
    """Return float32 logits (1, classes) that are `margin` at the label and noise elsewhere."""
    noise = 1e-3 * np.random.default_rng(other).normal(size=classes)
    noise[label] = margin
    return np.asarray(noise[None], np.float32)


def exact_surprise(logits, label, standardize=False):
    """Return the cross-entropy of one row as a sum over the other classes, exact at any margin."""
    z = np.asarray(logits, np.longdouble)
    if standardize:
        z = (z - z.mean()) / (z.std() + np.longdouble(1e-6))
    others = np.exp(np.delete(z, label) - z[label])
    return float(np.log1p(others.sum()))


@pytest.mark.parametrize("margin", [0.0, 1.0, 10.0, 20.0, 60.0, 80.0])
def test_cross_entropy_is_accurate_near_zero(margin):
    logits = confident(50, 3, margin)
    found = surprise(jnp.asarray(logits), jnp.array([3]))
    np.testing.assert_allclose(found, exact_surprise(logits[0], 3), rtol=1e-5)


def test_cross_entropy_of_two_classes_against_rational_numbers():
    """The first terms of the series of log(1 + e^-25) in e^-25 give the expected value."""
    small = Fraction(math.exp(-25))
    expected = float(small - small**2 / 2 + small**3 / 3)
    found = surprise(jnp.array([[25.0, 0.0]]), jnp.array([0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("ratio", ["A", "B"])
def test_heads_that_are_certain_of_different_classes(classes, ratio):
    kd, cls = confident(classes, 7), confident(classes, 3, other=1)
    scores = ipwd_scores(jnp.asarray(kd), jnp.asarray(cls), jnp.array([3]))
    expected = [exact_surprise(x[0], 3, standardize=True) for x in (kd, cls)]
    np.testing.assert_allclose(np.concatenate(scores), expected, rtol=1e-4)
    if ratio == "B":
        expected.reverse()
    weights = ipwd_weights(*scores, ratio)
    np.testing.assert_allclose(weights, 1 + expected[0] / expected[1], rtol=1e-4)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("classes", "margin"), [(10, 5.0), (1000, 50.0), (10, 1e4), (20_000, 1.0)])
def test_heads_that_agree_weigh_two_however_certain(classes, margin, standardize):
    logits = jnp.asarray(confident(classes, 3, margin))
    scores = ipwd_scores(logits, logits, jnp.array([3]), standardize)
    for ratio in ("A", "B"):
        assert ipwd_weights(*scores, ratio) == 2
        assert ipwd_weights(*map(np.asarray, scores), ratio) == 2


def test_the_largest_weight_leaves_room_for_a_loss():
    config = weighting(name="ipwd", standardize=False)
    right, wrong = (1e5 * np.eye(10)[[x] * 4] for x in (3, 5))
    weights, memory = weigh(
        config, outputs(wrong, cls=right), None, batch_of_four(), init_memory(config, 4)
    )
    assert np.isfinite(weights * np.float32(1e4) * np.float32(1e6)).all()
    assert (weights[2:] > 1e20).all() and (weights >= 1).all()  # samples whose label is 3
    assert np.isfinite(memory["weight"]).all()


def test_wsld_of_certain_networks():
    student, teacher = confident(10, 3, 14.0), confident(10, 3, 13.0, other=1)
    s, t = (exact_surprise(x[0], 3) for x in (student, teacher))
    found = wsld_weights(jnp.asarray(student), jnp.asarray(teacher), jnp.array([3]))
    np.testing.assert_allclose(found, -math.expm1(-s / (t + 1e-7)), rtol=1e-5)
