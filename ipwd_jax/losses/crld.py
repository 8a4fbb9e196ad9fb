"""Zhang et al., 2024 (Cross-view consistency regularisation): KD within and across two views."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, logits_of_views
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Outputs


def crld_loss(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    temperature: float = 4.0,
    within_weight: float = 2.0,
    across_weight: float = 0.5,
    weak_threshold: float = 0.9,
    strong_threshold: float = 0.2,
) -> jax.Array:
    """KD of each view with the same one, and of each view with the other, of each sample.

    Where the teacher's largest probability for the weak view, at temperature 1, is below
    `weak_threshold`, KD within both views is left out; where that for the strong view is below
    `strong_threshold`, KD across the views is. Agrees with the copy of CRLD in the code of DeepKD.

    Args:
        student: logits (B, C) of the weak and of the strong view.
        teacher: the same of the teacher.
        temperature: T > 0.
        within_weight: weight of KD within the views.
        across_weight: weight of KD across the views.
        weak_threshold: smallest confidence, in 0..1, with which the weak view counts.
        strong_threshold: the same for the strong view.

    Returns:
        (B,) loss in nats, times T^2.
    """
    (s_weak, s_strong), (t_weak, t_strong) = student, teacher
    within = kd_loss(s_weak, t_weak, temperature) + kd_loss(s_strong, t_strong, temperature)
    across = kd_loss(s_strong, t_weak, temperature) + kd_loss(s_weak, t_strong, temperature)
    sure_weak = jax.nn.softmax(t_weak).max(axis=1) >= weak_threshold
    sure_strong = jax.nn.softmax(t_strong).max(axis=1) >= strong_threshold
    return within_weight * jnp.where(sure_weak, within, 0) + (
        across_weight * jnp.where(sure_strong, across, 0)
    )


class CRLD(Term):
    """`crld_loss` of the two networks' logits for both views, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        temperature: T.
        within_weight: weight of KD within the views.
        across_weight: weight of KD across the views.
        weak_threshold: smallest confidence of the teacher with which the weak view counts.
        strong_threshold: the same for the strong view.
    """

    temperature: float = 4.0
    within_weight: float = 2.0
    across_weight: float = 0.5
    weak_threshold: float = 0.9
    strong_threshold: float = 0.2

    paper = "Zhang et al., 2024: Cross-view consistency regularisation"
    teacher_taps = ("logits",)
    strong_view = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return crld_loss(
            logits_of_views(student),
            logits_of_views(teacher),
            self.temperature,
            self.within_weight,
            self.across_weight,
            self.weak_threshold,
            self.strong_threshold,
        )
