"""MixUp and CutMix inside the compiled step.

The partner of a sample is drawn from the whole training set, so that what a sample is mixed with
depends on nothing but (seed, epoch, index), like its crop. In MixUp, the sample itself always has
the larger share, which makes no difference to the distribution of the pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixing(NamedTuple):
    """How the samples of a batch are mixed; all arrays are (B,).

    Attributes:
        partner: int32, positions in the training set of the samples that they are mixed with.
        share: float32, the share of the sample itself; 1 minus this is that of its partner.
        pastes: whether a box of the partner is pasted (CutMix); if not, the pixels are averaged.
        row, column: float32 in [0, 1), the centre of the box in units of the image's size.
    """

    partner: jax.Array
    share: jax.Array
    pastes: jax.Array
    row: jax.Array
    column: jax.Array


def draw(key: jax.Array, index: jax.Array, size: int, mixup: float, cutmix: float) -> Mixing:
    """Draw how the samples of a batch are mixed.

    If both `mixup` and `cutmix` are positive, each sample has one of the two with probability 1/2.

    Args:
        key: typed PRNG key of the epoch.
        index: (B,) int32, positions in the training set.
        size: number of training samples.
        mixup: the share is drawn from Beta(mixup, mixup) (Zhang et al., 2018); 0: no MixUp.
        cutmix: the same for CutMix (Yun et al., 2019).
    """

    def one(i: jax.Array) -> Mixing:
        own = jax.random.fold_in(key, i)
        which, kind, by_mixup, by_cutmix, place = jax.random.split(own, 5)
        pastes = jnp.bool_(cutmix > 0)
        if mixup > 0 and cutmix > 0:
            pastes = jax.random.bernoulli(kind)
        share = jnp.float32(1)
        if mixup > 0:
            share = jax.random.beta(by_mixup, mixup, mixup, dtype=jnp.float32)
            share = jnp.maximum(share, 1 - share)
        if cutmix > 0:
            of_box = jax.random.beta(by_cutmix, cutmix, cutmix, dtype=jnp.float32)
            share = jnp.where(pastes, of_box, share)
        row, column = jax.random.uniform(place, (2,), jnp.float32)
        partner = jax.random.randint(which, (), 0, size, jnp.int32)
        return Mixing(partner, share, pastes, row, column)

    return jax.vmap(one)(index)


def apply(images: jax.Array, partners: jax.Array, mixing: Mixing) -> tuple[jax.Array, jax.Array]:
    """Mix images with those of their partners.

    Args:
        images: (B, H, W, channels), normalised.
        partners: (B, H, W, channels), the normalised images of `mixing.partner`.
        mixing: what `draw` returns.

    Returns:
        The mixed images, and the share of each sample itself, (B,). Where a box is pasted, this is
        the share of its pixels: 1 minus the area of the box inside the image, whose sides are
        `sqrt(1 - mixing.share)` of the image's, rounded down to whole pixels.
    """
    height, width = images.shape[1:3]

    def one(image: jax.Array, partner: jax.Array, this: Mixing) -> tuple[jax.Array, jax.Array]:
        side = jnp.sqrt(1 - this.share)
        rows = _inside(jnp.trunc(height * side), this.row, height)
        columns = _inside(jnp.trunc(width * side), this.column, width)
        box = rows[:, None] & columns[None, :]
        pasted = jnp.where(box[..., None], partner, image)
        share = this.share.astype(image.dtype)
        averaged = share * image + (1 - share) * partner
        left = 1 - box.sum() / (height * width)
        return jnp.where(this.pastes, pasted, averaged), jnp.where(this.pastes, left, this.share)

    return jax.vmap(one)(images, partners, mixing)


def _inside(side: jax.Array, centre: jax.Array, size: int) -> jax.Array:
    """Return which of `size` pixels a box covers, given its side in pixels and its centre."""
    first, pixels = jnp.floor(centre * size) - jnp.floor(side / 2), jnp.arange(size)
    return (pixels >= first) & (pixels < first + side)
