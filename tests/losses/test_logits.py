"""Methods after 2022 that read logits: closed forms, curricula, and answers that are certain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import CLS_LOGITS, KD_LOGITS, LABELS, STUDENT, TEACHER, batch, random_outputs

from ipwd_jax.losses.abkd import abkd_loss
from ipwd_jax.losses.ctkd import CTKD
from ipwd_jax.losses.dist import dist_loss
from ipwd_jax.losses.dkd import dkd_loss
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.losses.nkd import USKD, nkd_loss, zipf_labels
from ipwd_jax.losses.rld import RLD, rld_loss
from ipwd_jax.losses.ttm import ttm_loss

S, T = jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS)
# Functions of the logits of student and teacher.
LOSSES = {
    "dist": lambda s, t: dist_loss(s, t, jnp.ones(len(s))),
    "nkd": lambda s, t: nkd_loss(s, t, LABELS),
    "ttm": lambda s, t: ttm_loss(s, t, 0.1),
    "wttm": lambda s, t: ttm_loss(s, t, 0.2, weighted=True),
    "rld": lambda s, t: rld_loss(s, t, LABELS),
    "abkd": abkd_loss,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("first", [0, 1])
def test_a_teacher_that_is_certain_is_finite(name, first):
    """The teacher gives all samples one class, which is the label of one of them or of none."""
    certain = jnp.full(T.shape, -1e4).at[:, first].set(1e4)
    for student in (S, jnp.zeros_like(S), -certain):
        loss, pull = jax.vjp(lambda s: LOSSES[name](s, certain), student)
        assert np.isfinite(loss).all()
        assert np.isfinite(pull(jnp.ones_like(loss))[0]).all()


@pytest.mark.parametrize("name", ["dist", "abkd"])
def test_equal_answers_have_no_loss(name):
    np.testing.assert_allclose(LOSSES[name](T + 3.0, T), 0, atol=1e-5)
    assert (LOSSES[name](S, T) > 1e-3).all()


def test_dist_sees_no_linear_change_of_the_probabilities():
    mixed = jnp.log(0.5 * jax.nn.softmax(T) + 0.05)  # half of it uniform, over ten classes
    np.testing.assert_allclose(dist_loss(mixed, T, jnp.ones(len(T))), 0, atol=1e-5)


def test_nkd_has_the_gradients_of_its_divergences():
    """At T = 1 its second part has the gradient of DKD's for the other classes."""
    of_nkd = jax.grad(lambda s: (nkd_loss(s, T, LABELS, 2.0) - nkd_loss(s, T, LABELS, 0.0)).sum())
    of_dkd = jax.grad(lambda s: dkd_loss(s, T, LABELS, 0.0, 2.0, 1.0).sum())
    np.testing.assert_allclose(of_nkd(S), of_dkd(S), atol=1e-5)


def test_ttm_with_exponent_one_is_kd():
    for weighted in (False, True):  # the probabilities themselves sum to 1
        found = ttm_loss(S, T, 1.0, weighted)
        np.testing.assert_allclose(found, kd_loss(S, T, 1.0), rtol=1e-4)


def test_abkd_comes_close_to_kd_and_refuses_its_limit():
    found = abkd_loss(S, T, 1.0, 1e-2, temperature=2.0)
    np.testing.assert_allclose(4 * found, kd_loss(S, T, 2.0), rtol=0.1)
    for alpha, beta in ((0.0, 0.3), (0.8, 0.0), (0.3, -0.3)):
        with pytest.raises(ValueError, match=r"divides by alpha, beta and their sum.*alpha=0"):
            abkd_loss(S, T, alpha, beta)


class TestRLD:
    def test_labels_that_the_teacher_ranks_first_give_dkd(self):
        found = rld_loss(S, T, T.argmax(axis=1), 1.0, 2.0)
        np.testing.assert_allclose(found, dkd_loss(S, T, T.argmax(axis=1), 1.0, 2.0), rtol=1e-4)

    def test_a_label_that_the_teacher_ranks_last_leaves_nothing_to_compare(self):
        last = T.argmin(axis=1)
        found, pull = jax.vjp(lambda s: rld_loss(s, T, last, 0.0, 8.0), S)
        np.testing.assert_array_equal(found, 0)
        np.testing.assert_array_equal(pull(jnp.ones(len(S)))[0], 0)

    def test_warmup(self):
        seen = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)
        early, late = (RLD().apply({}, *seen, batch(3, epoch=epoch)) for epoch in (4, 30))
        np.testing.assert_allclose(early, 0.25 * late, rtol=1e-5)


class TestCTKD:
    seen = random_outputs(STUDENT, 3, 1), random_outputs(TEACHER, 3, 2)

    def loss(self, g, epoch=0, **fields):
        variables = {"params": {"temperature": jnp.asarray([g])}}
        return CTKD(**fields).apply(variables, *self.seen, batch(3, epoch=epoch)).mean()

    def test_its_value_is_that_of_kd_or_dkd_at_its_temperature(self):
        student, teacher = (x.logits for x in self.seen)
        (temperature,) = CTKD().scalars({"params": {"temperature": np.ones(1)}}).values()
        np.testing.assert_allclose(temperature, 15.62117, rtol=1e-6)
        expected = kd_loss(student, teacher, temperature).mean()
        np.testing.assert_allclose(self.loss(1.0), expected, rtol=1e-5)
        expected = dkd_loss(student, teacher, batch(3).label, 1.0, 2.0, temperature).mean()
        np.testing.assert_allclose(self.loss(1.0, form="dkd"), expected, rtol=1e-5)

    @pytest.mark.parametrize("form", ["kd", "dkd"])
    def test_the_gradient_grows_against_the_student(self, form):
        with jax.enable_x64(True):
            plain = (self.loss(1.0 + 1e-6, form=form) - self.loss(1.0 - 1e-6, form=form)) / 2e-6
            for epoch, factor in ((0, -0.02447174), (4, -0.5), (9, -1.0), (100, -1.0)):
                found = jax.grad(self.loss)(1.0, epoch, form=form)
                np.testing.assert_allclose(found, factor * plain, rtol=1e-4)


def test_zipf_labels():
    """The target takes its rank from the others, but has no part in the sum."""
    log_p = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    target = jnp.array([[False, True, False, False]])
    found = zipf_labels(log_p, log_p, target)
    expected = np.array([1, 0, 1 / 3, 1 / 4])
    np.testing.assert_allclose(found[0], expected / expected.sum(), rtol=1e-6)


def test_uskd_refuses_a_network_with_one_map():
    student = random_outputs(STUDENT, 3, 1)
    student = student.replace(features=student.features[:1])
    with pytest.raises(ValueError, match=r"the feature map before the last, but .* has only 1"):
        USKD().init(jax.random.key(0), student, None, batch(3))
