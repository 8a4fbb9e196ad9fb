"""The part of a data set that lives on the device.

This is everything, or everything but the images if they are streamed.
"""

import flax.struct
import jax

from ipwd_jax.data.base import Dataset, Split


@flax.struct.dataclass
class Resident:
    """One split on the device.

    Attributes:
        images: (N, H, W, channels) uint8; None if they are streamed.
        labels: (N,) int32.
        mean: (channels,) float32, which is subtracted from the pixels in 0..1.
        std: (channels,) float32, by which the difference is divided.
    """

    images: jax.Array | None
    labels: jax.Array
    mean: jax.Array
    std: jax.Array

    def images_at(self, index: jax.Array) -> jax.Array:
        """Return the images at the positions `index`; they must not be streamed."""
        assert self.images is not None
        return self.images[index]


def resident(dataset: Dataset, split: Split) -> Resident:
    """Return a split of a data set with the statistics that normalise it, still in host memory."""
    images = None if split.streamed else split.in_memory
    # The NumPy arrays become JAX arrays when they are put on the devices.
    return Resident(images, split.labels, dataset.mean, dataset.std)  # type: ignore[arg-type]
