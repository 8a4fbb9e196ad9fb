"""What a data set is once it is read: two splits of images in memory."""

import dataclasses
import hashlib
from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from ipwd_jax.errors import UserError

TEST_FRACTION = 0.2  # default of `config.data.test_fraction`
_PIXELS_AT_ONCE = 2**24  # of the statistics, which need eight bytes for each

# Mean and deviation of the training pixels in 0..1, as the published recipes print them.
STATISTICS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Streamed(Protocol):
    """Images that are decoded when they are needed; see `ipwd_jax.data.streaming`."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, channels)."""

    @property
    def fingerprint(self) -> str:
        """Checksum of what identifies the images."""

    @property
    def flip(self) -> bool:
        """Whether training mirrors half of the images."""

    def batches(
        self, index: np.ndarray, seed: int, epoch: int, train: bool
    ) -> Generator[np.ndarray]:
        """Yield the uint8 images (B, H, W, channels) of each row of `index` (steps, B)."""

    def take(self, index: np.ndarray) -> "Streamed":
        """The images (M,) of `index` alone, in its order."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, channels) uint8, in memory or streamed, and their labels (N,) int32."""

    images: np.ndarray | Streamed
    labels: np.ndarray

    @property
    def streamed(self) -> bool:
        """Whether the images are not in memory."""
        return not isinstance(self.images, np.ndarray)

    @property
    def in_memory(self) -> np.ndarray:
        """The images where they are not streamed."""
        assert isinstance(self.images, np.ndarray)
        return self.images


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set.

    Attributes:
        name: for people.
        train: training split.
        test: test split.
        class_names: one per class, in the order of the labels.
        mean: (channels,) float32 of the training pixels in 0..1.
        std: (channels,) float32.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray


def from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    *,
    name: str = "arrays",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | np.ndarray = (),
    std: Sequence[float] | np.ndarray = (),
    test_fraction: float = TEST_FRACTION,
) -> Dataset:
    """Make a data set of NumPy arrays, with checks.

    Args:
        train_images: (N, H, W, channels) or (N, H, W) uint8.
        train_labels: (N,) integers from 0; every class occurs.
        test_images: likewise, or None: some samples of each class are held out (`hold_out`).
        test_labels: likewise.
        name: for people.
        class_names: one per class; default "0", "1", ...
        mean: per channel, of pixels in 0..1; default: computed from the training images.
        std: likewise.
        test_fraction: share of each class that is held out.

    Raises:
        UserError: something about the arrays is wrong; the message says what was found.
    """
    train = _split(f"{name} training", train_images, train_labels)
    if test_images is None:
        train, test = hold_out(train, test_fraction)
    else:
        test = _split(f"{name} test", test_images, test_labels)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{name}: training images have the shape {train.images.shape[1:]}, "
            f"test images {test.images.shape[1:]}"
        )
    classes = len(class_names) if class_names else int(train.labels.max()) + 1
    check_classes(name, classes, train.labels, test.labels)
    if not (len(mean) and len(std)):
        computed = _statistics(train.in_memory)
        mean, std = (mean if len(mean) else computed[0]), (std if len(std) else computed[1])
    mean, std = checked_statistics(name, train.images.shape[-1], mean, std)
    class_names = tuple(class_names or map(str, range(classes)))
    return Dataset(name, train, test, class_names, mean, std)


def check_classes(
    name: str, classes: int, train_labels: np.ndarray, test_labels: np.ndarray
) -> None:
    """Raises `UserError` for one class, a class without training images, or a label of no class."""
    if classes < 2:
        raise UserError(f"{name} has {classes} classes; at least 2 are needed")
    trained = set(train_labels.tolist())
    if missing := sorted(set(range(classes)) - trained):
        raise UserError(f"{name} has {classes} classes, without a training image: {missing[:10]}")
    if beyond := sorted((trained | set(test_labels.tolist())) - set(range(classes))):
        raise UserError(
            f"{name} has {classes} classes, but labels that are none of them: {beyond[:10]}"
        )


def checked_statistics(
    name: str,
    channels: int,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (channels,) as float32; `UserError` where they are not fit for it."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if (
        mean.shape != (channels,)
        or std.shape != (channels,)
        or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all())
    ):
        raise UserError(
            f"{name} has {channels} channels; mean and std need as many values, std above 0, "
            f"found mean {mean.tolist()} and std {std.tolist()}"
        )
    return mean, std


def _split(what: str, images: np.ndarray, labels: np.ndarray | None) -> Split:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise UserError(
            f"{what} images must be (N, H, W, channels) uint8 with pixels in 0..255, found "
            f"{images.shape} {images.dtype}; floats in 0..1 become so by (255 * x).astype('uint8')"
        )
    first, *others = images.shape[1:]
    if first in (1, 3, 4) and first < min(others) and others[-1] not in (1, 3, 4):
        raise UserError(
            f"{what} images have the shape {images.shape}, which looks like (N, channels, H, W); "
            "(N, H, W, channels) is needed: images.transpose(0, 2, 3, 1)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{what} labels must be {len(images)} integers, one per image, found "
            f"{labels.shape} {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(
            f"{what} labels start at 0 and fit into 32 bits, found {labels.min()} to {labels.max()}"
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """Part a split in two, each class alike, evenly over the order of its samples.

    Args:
        split: what is parted.
        fraction: share of each class that is held out, in (0, 0.5]; at least one sample of every
            class that has two.

    Returns:
        What stays and what is held out; a function of the arguments alone.
    """
    if not 0 < fraction <= 0.5:
        raise UserError(f"config.data.test_fraction must be in (0, 0.5], found {fraction}")
    held = np.zeros(len(split.labels), bool)
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        count = max(round(fraction * len(members)), int(len(members) > 1))
        held[members[(np.arange(count) + 1) * len(members) // (count + 1)]] = True
    if not held.any():
        raise UserError("every class has a single image, so none can be held out for testing")
    return (
        Split(split.in_memory[~held], split.labels[~held]),
        Split(split.in_memory[held], split.labels[held]),
    )


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel of pixels in 0..1; 1 for a channel that is constant."""
    # Exact sums of integers, from how often each of the 256 values occurs.
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for part in np.array_split(images, -(-images.size // _PIXELS_AT_ONCE)):
        for channel in range(images.shape[-1]):
            counts[channel] += np.bincount(part[..., channel].ravel(), minlength=256)
    share = counts / (images.size / images.shape[-1])
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean, np.where(std > 1e-6, std, 1.0)


def fingerprint(dataset: Dataset) -> str:
    """Checksum of everything that training and evaluation read: 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((dataset.train.images.shape, dataset.test.images.shape)).encode())
    for split in (dataset.train, dataset.test):
        if isinstance(split.images, np.ndarray):
            digest.update(split.images.tobytes())
        else:
            digest.update(split.images.fingerprint.encode())
        digest.update(split.labels.tobytes())
    digest.update(dataset.mean.tobytes() + dataset.std.tobytes())
    digest.update(repr(len(dataset.class_names)).encode())
    return digest.hexdigest()
