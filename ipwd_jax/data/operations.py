"""Random distortions of images inside the compiled step: RandAugment, and those of strong views.

The operations are those of torchvision's `RandAugment` on images of Pillow, pixel by pixel, except
that `autocontrast` is computed exactly where Pillow's rounding can lose 1 of 255.
Cubuk et al., 2020, RandAugment: Practical automated data augmentation with a reduced search space.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

# An operation takes an image (H, W, channels) uint8 and a strength, and returns such an image.
Operation = Callable[[jax.Array, jax.Array], jax.Array]
_N = jax.Array | float


def rand_augment(
    key: jax.Array, images: jax.Array, index: jax.Array, operations: int, magnitude: int
) -> jax.Array:
    """Apply randomly drawn operations to each image, one after the other.

    Each operation is drawn uniformly from `OPERATIONS`, with replacement, and its strength is that
    of `magnitude`; whether a strength that has a sign is positive is drawn too.

    Args:
        key: typed PRNG key of the epoch.
        images: (B, H, W, channels) uint8, of 1 or 3 channels.
        index: (B,) int32, positions in the training set. What is drawn for a sample depends on
            nothing but the key and its own index.
        operations: number of operations for each image.
        magnitude: strength, in 0..30.

    Returns:
        (B, H, W, channels) uint8.
    """
    height, width = images.shape[1:3]
    branches = [operation for operation, _, _ in OPERATIONS]
    strengths = [of_magnitude(magnitude, height, width) for _, of_magnitude, _ in OPERATIONS]
    values = jnp.array(strengths, jnp.float32)
    signed = jnp.array([has_sign for _, _, has_sign in OPERATIONS])

    def strength(key: jax.Array, chosen: jax.Array) -> jax.Array:
        flips = signed[chosen] & jax.random.bernoulli(key)
        return jnp.where(flips, -values[chosen], values[chosen])

    return jax.vmap(
        lambda image, i: _distort(jax.random.fold_in(key, i), image, operations, branches, strength)
    )(images, index)


def strong_augment(key: jax.Array, images: jax.Array, index: jax.Array) -> jax.Array:
    """Distort each image by two randomly drawn operations, and cut a square out of it.

    The operations are drawn uniformly from `STRONG_OPERATIONS`, with replacement, and their
    strengths uniformly from the ranges there. These are the strong views of Jin et al., 2023
    (Multi-level logit distillation). The square has a side of up to half the image's width and a
    centre anywhere in the image, and what lies inside the image becomes grey.

    Args:
        key: as in `rand_augment`.
        images: as in `rand_augment`.
        index: as in `rand_augment`.

    Returns:
        (B, H, W, channels) uint8.
    """
    branches = [operation for operation, _, _ in STRONG_OPERATIONS]
    low, high = (
        jnp.array([ends[i] for _, *ends in STRONG_OPERATIONS], jnp.float32) for i in (0, 1)
    )

    def strength(key: jax.Array, chosen: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (), jnp.float32, low[chosen], high[chosen])

    def distort(image: jax.Array, i: jax.Array) -> jax.Array:
        distortions, square = jax.random.split(jax.random.fold_in(key, i))
        image = _distort(distortions, image, 2, branches, strength)
        return cut_out(image, *jax.random.uniform(square, (3,), jnp.float32))

    return jax.vmap(distort)(images, index)


def _distort(
    key: jax.Array,
    image: jax.Array,
    operations: int,
    branches: Sequence[Operation],
    strength: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Apply drawn operations to an image; `strength(key, chosen)` is that of `branches[chosen]`."""
    for number in range(operations):
        which, how = jax.random.split(jax.random.fold_in(key, number))
        chosen = jax.random.randint(which, (), 0, len(branches))
        image = lax.switch(chosen, branches, image, strength(how, chosen))
    return image


def identity(image: jax.Array, _: jax.Array) -> jax.Array:
    """Return the image itself."""
    return image


def shear_x(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Shift each row by `strength` times its position below the top left corner."""
    return _affine(image, 1.0, strength, 0.0, 0.0, 1.0, 0.0)


def shear_y(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Shift each column by `strength` times its position right of the top left corner."""
    return _affine(image, 1.0, 0.0, 0.0, strength, 1.0, 0.0)


def translate_x(image: jax.Array, pixels: jax.Array) -> jax.Array:
    """Move the image by a whole number of pixels to the right; a fraction is cut off."""
    return _affine(image, 1.0, 0.0, -jnp.trunc(pixels), 0.0, 1.0, 0.0)


def translate_y(image: jax.Array, pixels: jax.Array) -> jax.Array:
    """Move the image by a whole number of pixels downwards; a fraction is cut off."""
    return _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, -jnp.trunc(pixels))


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Rotate the image about its centre, anticlockwise."""
    height, width = image.shape[:2]
    angle = -degrees * (math.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    return _affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _affine(image: jax.Array, a: _N, b: _N, c: _N, d: _N, e: _N, f: _N) -> jax.Array:
    """Let the pixel (x, y) show what is at (a x + b y + c, d x + e y + f), and black outside."""
    height, width = image.shape[:2]
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    column = jnp.floor(a * x + b * y + c).astype(jnp.int32)
    row = jnp.floor(d * x + e * y + f).astype(jnp.int32)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    found = image[row.clip(0, height - 1), column.clip(0, width - 1)]
    return jnp.where(inside[..., None], found, 0).astype(jnp.uint8)


def brightness(image: jax.Array, change: jax.Array) -> jax.Array:
    """Blend the image with black, to `1 + change` of its brightness."""
    return _blend(jnp.zeros_like(image), image, 1 + change)


def color(image: jax.Array, change: jax.Array) -> jax.Array:
    """Blend the image with its grey version, to `1 + change` of its saturation."""
    return _blend(jnp.broadcast_to(_grey(image), image.shape), image, 1 + change)


def contrast(image: jax.Array, change: jax.Array) -> jax.Array:
    """Blend the image with its mean grey value, to `1 + change` of its contrast."""
    grey = _grey(image)
    mean = jnp.floor(grey.astype(jnp.int32).sum() / grey.size + 0.5).astype(jnp.uint8)
    return _blend(jnp.full_like(image, mean), image, 1 + change)


def sharpness(image: jax.Array, change: jax.Array) -> jax.Array:
    """Blend the image with a smoothed version, to `1 + change` of its sharpness."""
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return image
    pixels = image.astype(jnp.int32)
    shifted = (pixels[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    # Around the border, the smoothed image is the image itself.
    total = sum(shifted) + 4 * pixels[1:-1, 1:-1]
    inner = ((2 * total + 13) // 26).astype(jnp.uint8)
    return _blend(image.at[1:-1, 1:-1].set(inner), image, 1 + change)


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keep the highest `bits` bits of each value; a fraction of a bit is cut off."""
    dropped = (8 - bits.astype(jnp.int32)).astype(jnp.uint8)
    return (image >> dropped) << dropped


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Invert the values that are not below the threshold."""
    return jnp.where(image < threshold, image, 255 - image)


def autocontrast(image: jax.Array, _: jax.Array) -> jax.Array:
    """Stretch the values of each channel to 0..255."""
    low, high = (f(image, axis=(0, 1), keepdims=True).astype(jnp.int32) for f in (jnp.min, jnp.max))
    stretched = (image - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched.astype(jnp.uint8), image)


def equalize(image: jax.Array, _: jax.Array) -> jax.Array:
    """Spread the values of each channel so that all are about equally frequent."""

    def channel(values: jax.Array) -> jax.Array:
        counts = jnp.zeros(256, jnp.int32).at[values.ravel()].add(1)
        step = (values.size - counts[values.max()]) // 255
        below = jnp.cumsum(counts) - counts
        table = (step // 2 + below) // jnp.maximum(step, 1)
        return jnp.where(step > 0, table.clip(0, 255).astype(jnp.uint8)[values], values)

    return jax.vmap(channel, in_axes=2, out_axes=2)(image)


def cut_out(image: jax.Array, size: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Fill a square with grey, as far as it lies inside the image.

    Args:
        image: (H, W, channels) uint8.
        size: side of the square, in [0, 1] of half the width of the image.
        row: its centre, in [0, 1] of the height.
        column: the same, of the width.
    """
    height, width, channels = image.shape
    half = size * width / 4
    rows, columns = (
        jnp.abs(jnp.arange(pixels) + 0.5 - centre * pixels) < half
        for pixels, centre in ((height, row), (width, column))
    )
    color = jnp.array([[[125, 123, 114]]], jnp.uint8)
    color = _grey(color) if channels == 1 else color
    return jnp.where(rows[:, None, None] & columns[None, :, None], color, image)


def _grey(image: jax.Array) -> jax.Array:
    """Return the luma of an image by ITU-R 601, (H, W, 1) uint8, rounded as Pillow does."""
    if image.shape[2] == 1:
        return image
    red, green, blue = (image[..., i : i + 1].astype(jnp.int32) for i in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(jnp.uint8)


def _blend(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    """Return `first + share (second - first)`, cut to 0..255, fractions cut off."""
    one, two = first.astype(jnp.float32), second.astype(jnp.float32)
    return (one + share * (two - one)).clip(0, 255).astype(jnp.uint8)


# Each operation; its strength as a function of the magnitude and the height and width of the
# images; and whether the strength has a random sign.
OPERATIONS: tuple[tuple[Operation, Callable[[int, int, int], float], bool], ...] = (
    (identity, lambda m, h, w: 0.0, False),
    (shear_x, lambda m, h, w: 0.3 * m / 30, True),
    (shear_y, lambda m, h, w: 0.3 * m / 30, True),
    (translate_x, lambda m, h, w: 150 / 331 * w * m / 30, True),
    (translate_y, lambda m, h, w: 150 / 331 * h * m / 30, True),
    (rotate, lambda m, h, w: m, True),
    (brightness, lambda m, h, w: 0.9 * m / 30, True),
    (color, lambda m, h, w: 0.9 * m / 30, True),
    (contrast, lambda m, h, w: 0.9 * m / 30, True),
    (sharpness, lambda m, h, w: 0.9 * m / 30, True),
    (posterize, lambda m, h, w: 8 - round(m / 7.5), False),
    (solarize, lambda m, h, w: 255 - 255 * m / 30, False),
    (autocontrast, lambda m, h, w: 0.0, False),
    (equalize, lambda m, h, w: 0.0, False),
)

# Each operation of a strong view, and the range of its strength. Translations are in shares of the
# image's size, and move it by whole pixels.
STRONG_OPERATIONS: tuple[tuple[Operation, float, float], ...] = (
    (identity, 0.0, 0.0),
    (shear_x, -0.3, 0.3),
    (shear_y, -0.3, 0.3),
    (lambda image, share: translate_x(image, jnp.round(share * image.shape[1])), -0.3, 0.3),
    (lambda image, share: translate_y(image, jnp.round(share * image.shape[0])), -0.3, 0.3),
    (rotate, -30.0, 30.0),
    (brightness, -0.95, -0.05),
    (color, -0.95, -0.05),
    (contrast, -0.95, -0.05),
    (sharpness, -0.95, -0.05),
    (posterize, 4.0, 8.0),
    (solarize, 0.0, 256.0),
    (autocontrast, 0.0, 0.0),
    (equalize, 0.0, 0.0),
)
