"""KD with logit adjustment against NumPy, and against KD if nothing is adjusted."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import STUDENT, TEACHER, batch, random_outputs

from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.losses.la import KDLA, kd_la_loss


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
