"""Closed forms of KD."""

import jax
import jax.numpy as jnp
import numpy as np
from losses_helpers import CLS_LOGITS, KD_LOGITS

from ipwd_jax.losses.kd import kd_loss


def test_kd_is_zero_only_for_equal_answers_and_has_the_gradient_of_the_soft_cross_entropy():
    student, teacher = jnp.asarray(KD_LOGITS), jnp.asarray(CLS_LOGITS)
    np.testing.assert_allclose(kd_loss(student, student + 3.0, 4.0), 0, atol=1e-5)
    assert (kd_loss(student, teacher, 4.0) > 0.1).all()
    gradient = [
        jax.grad(lambda s, c=c: kd_loss(s, teacher, 4.0, cross_entropy=c).sum())(student)
        for c in (False, True)
    ]
    np.testing.assert_allclose(*gradient, atol=1e-5)
