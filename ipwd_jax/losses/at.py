"""Zagoruyko and Komodakis, 2017 (Paying more attention to attention): match where networks look."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, l2_normalize, pool_to_smaller, sum_losses
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def attention(x: jax.Array) -> jax.Array:
    """The mean square over the channels, as a unit vector: (B, H, W, C) -> (B, H W)."""
    return l2_normalize(jnp.square(x).mean(axis=-1).reshape(len(x), -1))


def at_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference between the two attention vectors of each sample.

    The larger map is first average-pooled to the size of the smaller one. Agrees with `Attention`
    of RepDistiller (p = 2), which takes a mean over the pixels; it is smaller than the norm that
    the paper uses.

    Args:
        student: (B, H, W, C).
        teacher: (B, H', W', C').

    Returns:
        (B,) loss, in float32 or better.
    """
    s, t = map(attention, pool_to_smaller(*at_least_float32((student, teacher))))
    return jnp.square(s - t).mean(axis=1)


class AT(Term):
    """`at_loss` of each map after the stem, summed over the maps, per sample.

    The largest intermediate array is (B, H, W, C), the square of the largest map.
    """

    paper = "Zagoruyko and Komodakis, 2017: Paying more attention to attention"
    teacher_taps = ("features",)
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pairs = zip(student.features[1:], teacher.features[1:], strict=False)
        return sum_losses(at_loss(s, t) for s, t in pairs)
