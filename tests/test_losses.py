"""Closed forms and invariances of losses and weights, and how they are assembled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipwd_jax import assemble, data, losses, models
from ipwd_jax import config as config_lib
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch, cross_entropy
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.losses.weighting import init_memory, ipwd_scores, ipwd_weights, weigh
from ipwd_jax.models.base import Outputs

LABELS = jnp.array([1, 7, 3, 3])


def wave(a, b, scale):
    i = np.arange(1, 41)
    return (scale * (np.sin(a * i) + 0.5 * np.cos(b * i))).reshape(4, 10)


KD_LOGITS, CLS_LOGITS = wave(0.7, 1.9, 2), wave(1.1, 0.3, 3)


def outputs(logits, **extra):
    return Outputs(
        logits=jnp.asarray(logits, jnp.float32),
        embedding=jnp.zeros((len(logits), 3)),
        features=(),
        preact=(),
        extra_logits={name: jnp.asarray(x, jnp.float32) for name, x in extra.items()},
    )


def batch(index=(0, 1, 2, 3), mask=(1, 1, 1, 1), epoch=0):
    return Batch(
        image=jnp.zeros((4, 1, 1, 1)),
        label=LABELS,
        index=jnp.array(index),
        view=jnp.zeros(4, jnp.int32),
        mask=jnp.array(mask, jnp.float32),
        epoch=jnp.int32(epoch),
        train_labels=LABELS,
        key=jax.random.key(0),
    )


def weighting(**settings):
    config = config_lib.default().weighting
    config.update(settings)
    return config


def ipwd(batch_, memory=None, **settings):
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
        weights, memory = ipwd(batch(), ratio=ratio)
        np.testing.assert_allclose(weights, getattr(self, ratio), rtol=1e-5)
        np.testing.assert_allclose(memory["h_kd"], [*self.H_KD, 0, 0], rtol=1e-5)
        np.testing.assert_allclose(memory["h_cls"], [*self.H_CLS, 0, 0], rtol=1e-5)
        np.testing.assert_allclose(memory["weight"], [*getattr(self, ratio), 0, 0], rtol=1e-5)

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
            return weigh(config, student, None, batch(), init_memory(config, 4))[0].sum()

        grads = jax.grad(total, argnums=(0, 1))(jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS))
        assert not any(np.any(g) for g in grads)

    def test_clip(self):
        np.testing.assert_allclose(ipwd(batch(), clip=3.0)[0], np.minimum(self.A, 3.0), rtol=1e-5)

    def test_batch_normalisation_leaves_out_padding(self):
        weights, memory = ipwd(batch(mask=(1, 1, 1, 0)), batch_normalize=True)
        np.testing.assert_allclose(weights, self.A / np.mean(self.A[:3]), rtol=1e-5)
        assert memory["weight"][3] == 0, "a row of padding was remembered"

    def test_start_epoch(self):
        assert np.array_equal(ipwd(batch(epoch=1), start_epoch=2)[0], np.ones(4))
        np.testing.assert_allclose(ipwd(batch(epoch=2), start_epoch=2)[0], self.A, rtol=1e-5)

    def test_running_mean_over_visits(self):
        first, memory = ipwd(batch(), average=0.75)
        np.testing.assert_allclose(first, self.A, rtol=1e-5)
        second, memory = ipwd(batch(index=(1, 0, 2, 3)), memory, average=0.75)
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
    weights, memory = weigh(weighting(), student, None, batch(), {})
    assert np.array_equal(weights, np.ones(4)) and memory == {}
    config = weighting(name="constant", constant=2.5)
    weights, memory = weigh(config, student, None, batch(), init_memory(config, 5))
    assert np.array_equal(weights, np.full(4, 2.5))
    assert np.array_equal(memory["weight"], [2.5, 2.5, 2.5, 2.5, 0])


def test_label_smoothing_mixes_label_and_uniform_targets():
    logits = jnp.asarray(KD_LOGITS, jnp.float32)
    target = 0.9 * np.eye(10)[np.asarray(LABELS)] + 0.1 / 10
    expected = -(target * jax.nn.log_softmax(logits)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(logits, LABELS, 0.1), expected, rtol=1e-5)


def test_kd_is_zero_only_for_equal_answers_and_has_the_gradient_of_the_soft_cross_entropy():
    student, teacher = jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS)
    np.testing.assert_allclose(kd_loss(student, student + 3.0, 4.0), 0, atol=1e-5)
    assert (kd_loss(student, teacher, 4.0) > 0.1).all()
    gradient = [
        jax.grad(lambda s, c=c: kd_loss(s, teacher, 4.0, cross_entropy=c).sum())(student)
        for c in (False, True)
    ]
    np.testing.assert_allclose(*gradient, atol=1e-5)


def test_create_takes_active_terms_with_their_hyper_parameters():
    config = config_lib.default()
    config.loss.kd = 0.9
    config.terms.kd.temperature = 2.0
    terms = losses.create(config.loss, config.terms, {})
    assert terms.keys() == {"ce", "kd"}
    assert terms["kd"].temperature == 2.0


def test_each_term_names_what_it_asks_for():
    for name, term in losses.TERMS.items():
        instance = term(**losses.hyper_parameters(name))
        fields = {field.name for field in dataclasses.fields(Outputs)}
        assert set(instance.teacher_taps) <= fields, name
        assert set(instance.heads.values()) <= set(models.heads.SOURCES), name
        assert hasattr(instance, "pretrain") == bool(instance.first_stage_params), name
    assert losses.TERMS["cls"](source="detached").heads == {"cls": "detached"}


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


def of_term(path, value):
    """A run of the term with one setting changed, put together."""
    config = config_lib.default()
    config.model.name = config.teacher.name = "wrn_10_1"
    config.loss[path.partition(".")[0]] = 1.0
    config.terms.update_from_flattened_dict({path: value})
    images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.arange(8) % 2
    return assemble.assemble(config, data.from_arrays(images, labels, images, labels), None)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("fitnet.layer", 9, "config.terms.fitnet.layer is 9, but .* the maps 0 to 3 in common"),
        ("fitnet.layer", -5, "config.terms.fitnet.layer is -5"),
        ("ft.rate", 0.001, "config.terms.ft.rate is 0.001, .* 64 .* at least 0.015625"),
        ("vid.variance", 1e-6, "config.terms.vid.variance must be above 1e-05, .* found 1e-06"),
        ("vid.variance", 1e-5, "config.terms.vid.variance must be above 1e-05"),
    ],
)
def test_settings_that_leave_nothing_to_compare_are_refused(path, value, words):
    with pytest.raises(UserError, match=words):
        of_term(path, value)


@pytest.mark.parametrize(("path", "value"), [("fitnet.layer", -1), ("ft.rate", 1 / 64)])
def test_settings_at_the_edge_are_taken(path, value):
    of_term(path, value)


@pytest.mark.parametrize("variance", [2e-5, 5.0, 45.0, 1e4])
def test_variances_start_where_they_are_set(variance):
    maps = outputs(KD_LOGITS).replace(features=(jnp.zeros((4, 2, 2, 3)),) * 2)
    variables = losses.TERMS["vid"](variance=variance).init(jax.random.key(0), maps, maps, batch())
    log_scale = np.float64(variables["params"]["0"]["log_scale"])
    np.testing.assert_allclose(np.logaddexp(0, log_scale) + 1e-5, variance, rtol=1e-5)
