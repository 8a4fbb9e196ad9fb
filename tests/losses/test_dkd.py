"""DKD: closed forms, its warm-up, and answers that are certain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_helpers import STUDENT, TEACHER, batch, random_outputs

from ipwd_jax.losses.dkd import DKD, dkd_loss
from ipwd_jax.losses.kd import kd_loss


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
            DKD().apply({}, student, teacher, batch(3, epoch=epoch)), factor * full, rtol=1e-5
        )
