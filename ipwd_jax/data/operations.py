"""RandAugment: random distortions of images inside the compiled step.

The operations are those of torchvision's `RandAugment` on images of Pillow, pixel by pixel, except
that `autocontrast` is computed exactly where Pillow's rounding can lose 1 of 255.
Cubuk et al., 2020, RandAugment: Practical automated data augmentation with a reduced search space.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# An operation takes an image (H, W, channels) uint8 and a strength, and returns such an image.
Operation = Callable[[jax.Array, jax.Array], jax.Array]


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
    strengths = [strength(magnitude, height, width) for _, strength, _ in OPERATIONS]
    values = jnp.array(strengths, jnp.float32)
    signed = jnp.array([has_sign for _, _, has_sign in OPERATIONS])

    def distort(image: jax.Array, i: jax.Array) -> jax.Array:
        for number in range(operations):
            own = jax.random.fold_in(jax.random.fold_in(key, i), number)
            which, sign = jax.random.split(own)
            chosen = jax.random.randint(which, (), 0, len(OPERATIONS))
            flips = signed[chosen] & jax.random.bernoulli(sign)
            value = jnp.where(flips, -values[chosen], values[chosen])
            image = lax.switch(chosen, branches, image, value)
        return image

    return jax.vmap(distort)(images, index)


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


def _affine(
    image: jax.Array,
    a: jax.Array | float,
    b: jax.Array | float,
    c: jax.Array | float,
    d: jax.Array | float,
    e: jax.Array | float,
    f: jax.Array | float,
) -> jax.Array:
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
