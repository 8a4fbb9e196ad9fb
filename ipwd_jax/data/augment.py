"""Random crops and flips as pure functions inside the compiled step, and the order of the samples.

A crop and a flip depend on nothing but (seed, epoch, index), and the order on (seed, epoch). The
batch that a sample is in, the number of devices and the step at which a run was interrupted make no
difference.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def num_views(padding: int, flip: bool) -> int:
    """Return how many views an image has: `(2 padding + 1)^2` crops, doubled if `flip` is set."""
    return (2 * padding + 1) ** 2 * (1 + flip)


def draw_views(key: jax.Array, epoch: jax.Array, index: jax.Array, views: int) -> jax.Array:
    """Draw a view of each sample uniformly.

    Args:
        key: typed PRNG key of the run.
        epoch: scalar integer.
        index: (B,) int32, positions in the training set.
        views: the number of views, as `num_views` returns it.

    Returns:
        (B,) int32 in 0..views-1. Each element depends on nothing but the key, the epoch and the
        sample's own index.
    """
    key = jax.random.fold_in(key, epoch)

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, i), (), 0, views, jnp.int32)

    return jax.vmap(draw)(index)


def draw_rotated_views(
    key: jax.Array, epoch: jax.Array, index: jax.Array, padding: int, flip: bool
) -> jax.Array:
    """Draw a view for each of the four rotations of every image.

    Every rotation has a crop of its own; either all four are mirrored or none is.

    Args:
        key: as in `draw_views`.
        epoch: as in `draw_views`.
        index: as in `draw_views`.
        padding: as in `apply_views`.
        flip: as in `apply_views`.

    Returns:
        (B, 4) int32; the first column equals what `draw_views` draws.
    """
    upright = draw_views(key, epoch, index, num_views(padding, flip))
    crops, mirrored = num_views(padding, False), upright % 2 if flip else 0
    views = [upright]
    for turn in (1, 2, 3):
        crop = draw_views(jax.random.fold_in(key, turn), epoch, index, crops)
        views.append(2 * crop + mirrored if flip else crop)
    return jnp.stack(views, axis=1)


def apply_rotated_views(images: jax.Array, views: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Mirror each image if its views ask for it, rotate it by 0, 90, 180 and 270 degrees, and crop.

    Args:
        images: (B, H, H, channels) uint8.
        views: (B, 4) int32, as `draw_rotated_views` returns them.
        padding: as in `apply_views`.
        flip: as in `apply_views`.

    Returns:
        (4 B, H, H, channels) uint8; the four rotations of an image are adjacent.
    """
    # `apply_views` mirrors last, but rotation comes after mirroring. Rotating in the opposite
    # direction before mirroring gives the same image.
    mirrored = (views[:, 0] % 2 if flip else 0 * views[:, 0]).reshape(-1, 1, 1, 1) > 0
    turned = []
    for turn in range(4):
        left, right = (jnp.rot90(images, k, axes=(1, 2)) for k in (turn, -turn))
        turned.append(apply_views(jnp.where(mirrored, right, left), views[:, turn], padding, flip))
    return jnp.stack(turned, axis=1).reshape(-1, *images.shape[1:])


def apply_views(images: jax.Array, view: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Add a black border to each image, cut its view out, and mirror the view if it asks for it.

    This is what torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip` do: the border
    is black before normalisation.

    Args:
        images: (B, H, W, channels) uint8.
        view: (B,) int32, `(row * (2 padding + 1) + column) * F + mirrored`, where F is 2 if `flip`
            is set and 1 otherwise, and row and column of the crop's corner are in 0..2 padding.
        padding: width of the border in pixels.
        flip: whether views can be mirrored.

    Returns:
        (B, H, W, channels) uint8.
    """
    side = 2 * padding + 1
    border = (padding, padding)
    bordered = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    crop, mirrored = jnp.divmod(view, 2) if flip else (view, jnp.zeros_like(view))

    def cut(image: jax.Array, crop: jax.Array, mirrored: jax.Array) -> jax.Array:
        corner = crop // side, crop % side, jnp.zeros_like(crop)
        image = lax.dynamic_slice(image, corner, images.shape[1:])
        return jnp.where(mirrored, image[:, ::-1], image)

    return jax.vmap(cut)(bordered, crop, mirrored)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Return `(images / 255 - mean) / std` per channel, in the type of `mean`.

    Args:
        images: (B, H, W, channels) uint8.
        mean: (channels,).
        std: (channels,).

    Returns:
        (B, H, W, channels).
    """
    row = (1, 1, 1, -1)
    return (images.astype(mean.dtype) / 255 - mean.reshape(row)) / std.reshape(row)


def epoch_order(key: jax.Array, epoch: int, size: int) -> np.ndarray:
    """Return the order (size,) int32 in which an epoch visits the training set.

    It depends on nothing but the key, the epoch and the size.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    return np.asarray(order, np.int32)


def epoch_batches(
    order: np.ndarray, batch_size: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split an order into steps, and each step into the rows of each device.

    The last step is kept however short it is: the 50,000 images of CIFAR make 782 steps of 64
    images, of which the last has 16. The mask marks the padding rows that fill up the steps.

    Args:
        order: (N,) int32.
        batch_size: number of images in a step, over all devices.
        devices: number of devices; it need not divide `batch_size`.

    Returns:
        The index (steps, devices, rows) int32, which is 0 in padding rows, and the mask of the same
        shape, float32, which is 1 in the N valid rows and 0 in padding rows.
    """
    steps, rows = -(-len(order) // batch_size), -(-batch_size // devices)
    padded = np.full(steps * batch_size, -1, np.int32)
    padded[: len(order)] = order
    index: np.ndarray = np.full((steps, devices * rows), -1, np.int32)
    index[:, :batch_size] = padded.reshape(steps, batch_size)
    index = index.reshape(steps, devices, rows)
    return np.maximum(index, 0), (index >= 0).astype(np.float32)
