"""Random crop and flip as pure functions of the compiled step, and the order of the samples.

Both depend on (seed, epoch, index) alone: not on the batch a sample is in, the number of devices,
or where a run was interrupted.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def num_views(padding: int, flip: bool) -> int:
    """Number of different views of an image: `(2 padding + 1)^2` crops, twice that with flips."""
    return (2 * padding + 1) ** 2 * (1 + flip)


def draw_views(key: jax.Array, epoch: jax.Array, index: jax.Array, views: int) -> jax.Array:
    """Draw a view for each sample, uniformly.

    Args:
        key: typed PRNG key of the run.
        epoch: scalar integer.
        index: (B,) int32, positions in the training set.
        views: of `num_views`.

    Returns:
        (B,) int32 in 0..views-1, each a function of (key, epoch, its index) alone.
    """
    key = jax.random.fold_in(key, epoch)

    def draw(i: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, i), (), 0, views, jnp.int32)

    return jax.vmap(draw)(index)


def draw_rotated_views(
    key: jax.Array, epoch: jax.Array, index: jax.Array, padding: int, flip: bool
) -> jax.Array:
    """Draw a view for each of an image's four rotations: a crop each, mirrored all or none.

    Returns:
        (B, 4) int32; the first column is what `draw_views` draws.
    """
    upright = draw_views(key, epoch, index, num_views(padding, flip))
    crops, mirrored = num_views(padding, False), upright % 2 if flip else 0
    views = [upright]
    for turn in (1, 2, 3):
        crop = draw_views(jax.random.fold_in(key, turn), epoch, index, crops)
        views.append(2 * crop + mirrored if flip else crop)
    return jnp.stack(views, axis=1)


def apply_rotated_views(images: jax.Array, views: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Mirror each image where its views say so, turn it by 0, 90, 180 and 270 degrees, and crop.

    Args:
        images: (B, H, H, channels) uint8.
        views: (B, 4) of `draw_rotated_views`.
        padding: as in `apply_views`.
        flip: as in `apply_views`.

    Returns:
        (4 B, H, H, channels) uint8, image by image.
    """
    # `apply_views` mirrors last. Turned the other way round before, an image comes out the same.
    mirrored = (views[:, 0] % 2 if flip else 0 * views[:, 0]).reshape(-1, 1, 1, 1) > 0
    turned = []
    for turn in range(4):
        left, right = (jnp.rot90(images, k, axes=(1, 2)) for k in (turn, -turn))
        turned.append(apply_views(jnp.where(mirrored, right, left), views[:, turn], padding, flip))
    return jnp.stack(turned, axis=1).reshape(-1, *images.shape[1:])


def apply_views(images: jax.Array, view: jax.Array, padding: int, flip: bool) -> jax.Array:
    """Cut each image's view out of the image in a black border, and mirror it where it says so.

    As torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip`: the border is black
    before normalisation.

    Args:
        images: (B, H, W, channels) uint8.
        view: (B,) int32, `(row * (2 padding + 1) + column) * F + mirrored`, with F 2 if `flip`
            else 1, and row and column of the crop's corner in 0..2 padding.
        padding: pixels of border on each side.
        flip: whether views may be mirrored.

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
    """`(images / 255 - mean) / std` per channel: (B, H, W, channels) uint8 -> type of `mean`."""
    row = (1, 1, 1, -1)
    return (images.astype(mean.dtype) / 255 - mean.reshape(row)) / std.reshape(row)


def epoch_order(key: jax.Array, epoch: int, size: int) -> np.ndarray:
    """Order (size,) int32 in which an epoch visits the training set; a function of (key, epoch)."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
    return np.asarray(order, np.int32)


def epoch_batches(
    order: np.ndarray, batch_size: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut an order into steps, and each step into the rows of each device.

    The last step is kept, however short (782 steps of 64 for the 50,000 images of CIFAR, the last
    of 16). Rows that only pad are marked.

    Args:
        order: (N,) int32.
        batch_size: images of a step over all devices.
        devices: number of devices; need not divide `batch_size`.

    Returns:
        index (steps, devices, rows) int32, 0 where it pads, and mask of the same shape, float32,
        1 for the N valid rows and 0 for padding.
    """
    steps, rows = -(-len(order) // batch_size), -(-batch_size // devices)
    padded = np.full(steps * batch_size, -1, np.int32)
    padded[: len(order)] = order
    index: np.ndarray = np.full((steps, devices * rows), -1, np.int32)
    index[:, :batch_size] = padded.reshape(steps, batch_size)
    index = index.reshape(steps, devices, rows)
    return np.maximum(index, 0), (index >= 0).astype(np.float32)
