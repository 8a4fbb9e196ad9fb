"""What of a data set lives on the device: all, or its labels where the images are streamed."""

import flax.struct
import jax

from ipwd_jax.data.base import Dataset, Split


@flax.struct.dataclass
class Resident:
    """One split on the device.

    Attributes:
        images: (N, H, W, channels) uint8; None where they are streamed.
        labels: (N,) int32.
        mean: (channels,) float32, subtracted from pixels in 0..1.
        std: (channels,) float32, by which they are divided.
    """

    images: jax.Array | None
    labels: jax.Array
    mean: jax.Array
    std: jax.Array

    def images_at(self, index: jax.Array) -> jax.Array:
        """The images at some positions, where they are not streamed."""
        assert self.images is not None
        return self.images[index]


def resident(dataset: Dataset, split: Split) -> Resident:
    """A split of a data set with the statistics that normalise it, still in host memory."""
    images = None if split.streamed else split.in_memory
    # NumPy's arrays become JAX's on the devices.
    return Resident(images, split.labels, dataset.mean, dataset.std)  # type: ignore[arg-type]
