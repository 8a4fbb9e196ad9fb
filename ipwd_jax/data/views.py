"""What the networks see of a batch: its images cropped, mirrored, distorted, normalised and mixed.

Everything that is drawn for a sample depends on nothing but (seed, epoch, index).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ipwd_jax.data import augment, mixing, operations
from ipwd_jax.data.resident import Resident

# Numbers that are folded into the key; no epoch has such a number.
_DISTORTIONS, _MIXING, _STRONG = 2**31, 2**31 + 1, 2**31 + 2


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The random changes of the images.

    Attributes:
        crop_padding: width in pixels of the border for random crops; see `augment`.
        flip: whether views are mirrored at random.
        operations: number of random distortions of each image; see `operations`.
        magnitude: strength of the distortions.
        mixup: parameter of MixUp, 0 for none; see `mixing`.
        cutmix: parameter of CutMix, 0 for none.
    """

    crop_padding: int
    flip: bool
    operations: int = 0
    magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0


class Views(NamedTuple):
    """The images that the networks see, and how they came about.

    Attributes:
        images: (B, H, W, channels), normalised; (4 B, ...) if they are rotated.
        view: (B,) int32, which crop and flip each image shows; 0 if the images are streamed.
        mixed: `partner_label` (B,) int32 and `share` (B,) float32, as in `losses.base.Batch`, if
            images are mixed; otherwise empty.
    """

    images: jax.Array
    view: jax.Array
    mixed: dict[str, jax.Array]


def load(
    how: Augmentation,
    key: jax.Array,
    epoch: jax.Array,
    data: Resident,
    index: jax.Array,
    streamed: jax.Array | None = None,
    rotated: bool = False,
) -> Views:
    """Return the augmented images of a batch.

    Args:
        how: the random changes.
        key: typed PRNG key of the run's augmentation.
        epoch: scalar integer.
        data: the training split on the device.
        index: (B,) int32, positions in `data`.
        streamed: (B, H, W, channels) uint8, already cropped and mirrored; None: those of `data`.
        rotated: whether each image is seen in four rotations.
    """
    padding, flip = how.crop_padding, how.flip
    if streamed is not None:
        view, images = jnp.zeros_like(index), streamed
    elif rotated:
        views = augment.draw_rotated_views(key, epoch, index, padding, flip)
        view = views[:, 0]
        images = augment.apply_rotated_views(data.images_at(index), views, padding, flip)
    else:
        view, images = _crop(how, key, epoch, index, data.images_at(index))
    images = _finish(how, key, epoch, index, images, data)
    if not (how.mixup or how.cutmix):
        return Views(images, view, {})
    # The partner's crop and distortions, like everything else, are drawn for the sample.
    key = jax.random.fold_in(key, _MIXING)
    size = len(data.labels)
    drawn = mixing.draw(jax.random.fold_in(key, epoch), index, size, how.mixup, how.cutmix)
    _, partners = _crop(how, key, epoch, index, data.images_at(drawn.partner))
    images, share = mixing.apply(images, _finish(how, key, epoch, index, partners, data), drawn)
    return Views(images, view, {"partner_label": data.labels[drawn.partner], "share": share})


def strong(
    how: Augmentation,
    key: jax.Array,
    epoch: jax.Array,
    data: Resident,
    index: jax.Array,
    streamed: jax.Array | None = None,
) -> jax.Array:
    """Return a strong view of each image of a batch, (B, H, W, channels), normalised.

    It has a crop and a flip of its own, and the distortions of `operations.strong_augment`. The
    arguments are those of `load`; streamed images are other crops than those of `load`.
    """
    key, images = jax.random.fold_in(key, _STRONG), streamed
    if images is None:
        _, images = _crop(how, key, epoch, index, data.images_at(index))
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), _DISTORTIONS)
    images = operations.strong_augment(key, images, index)
    return augment.normalize(images, data.mean, data.std)


def _crop(
    how: Augmentation, key: jax.Array, epoch: jax.Array, index: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a crop and a flip for each sample, and apply them to images (B, ...) uint8."""
    view = augment.draw_views(key, epoch, index, augment.num_views(how.crop_padding, how.flip))
    return view, augment.apply_views(images, view, how.crop_padding, how.flip)


def _finish(
    how: Augmentation,
    key: jax.Array,
    epoch: jax.Array,
    index: jax.Array,
    images: jax.Array,
    data: Resident,
) -> jax.Array:
    """Distort images (B, ...) uint8 as is drawn for each sample, and normalise them."""
    if how.operations:
        key = jax.random.fold_in(jax.random.fold_in(key, epoch), _DISTORTIONS)
        images = operations.rand_augment(key, images, index, how.operations, how.magnitude)
    return augment.normalize(images, data.mean, data.std)
