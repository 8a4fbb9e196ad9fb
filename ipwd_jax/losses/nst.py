"""Huang and Wang, 2017 (Like what you like): match the distribution of channels."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, l2_normalize, pool_to_smaller, sum_losses
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def nst_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Maximum mean discrepancy between the channels of two maps, for each sample.

    The larger map is first average-pooled to the size of the smaller one. Each channel is
    normalised to a unit vector over the pixels, and the kernel is the squared scalar product.
    Agrees with `NSTLoss` of RepDistiller, which computes the products of all channels element by
    element. Only their sums matter, and with the channels as columns of S and T,
    `|S' T|^2 = <S S', T T'>`. The loss is therefore either the squared distance between two
    pixel-by-pixel matrices, or a combination of three sums over channel-by-channel matrices. The
    static shapes decide which matrices are smaller. The first form does not suffer from
    cancellation.

    Args:
        student: (B, H, W, C).
        teacher: (B, H', W', C').

    Returns:
        (B,) loss, in float32 or better.
    """
    maps = pool_to_smaller(*at_least_float32((student, teacher)))
    s, t = (l2_normalize(x.reshape(len(x), -1, x.shape[-1]), axis=1) for x in maps)
    if s.shape[1] <= max(s.shape[2], t.shape[2]):
        return jnp.square(_pixel_gram(s) - _pixel_gram(t)).sum(axis=(1, 2))
    return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _pixel_gram(x: jax.Array) -> jax.Array:
    """Mean of the channels' outer products with themselves: (B, HW, C) -> (B, HW, HW)."""
    return jnp.einsum("bpc,bqc->bpq", x, x, precision="highest") / x.shape[-1]


def _mean_kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared scalar product of the channels: (B, HW, C) and (B, HW, C') -> (B,)."""
    products = jnp.einsum("bpc,bpd->bcd", a, b, precision="highest")
    return jnp.square(products).mean(axis=(1, 2))


class NST(Term):
    """`nst_loss` of each map after the stem, summed over the maps, per sample.

    The largest intermediate array is a normalised map, (B, H, W, C), or the smaller one of
    (B, HW, HW) and (B, C, C), where C is the number of channels of the wider map.
    """

    paper = "Huang and Wang, 2017: Like what you like"
    teacher_taps = ("features",)
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        pairs = zip(student.features[1:], teacher.features[1:], strict=False)
        return sum_losses(nst_loss(s, t) for s, t in pairs)
