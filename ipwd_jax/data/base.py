"""The form that every data set has once it is read: its splits of images, and their statistics."""

import dataclasses
import hashlib
import itertools
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from ipwd_jax.errors import UserError

TEST_FRACTION = 0.2  # default of `config.data.test_fraction`
_PIXELS_AT_ONCE = 2**24  # counting needs eight bytes for each of them

# Mean and standard deviation of the training pixels in 0..1, rounded as in the published recipes.
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
        """A checksum of what identifies the images."""

    @property
    def flip(self) -> bool:
        """Whether training mirrors half of the images."""

    def batches(
        self, index: np.ndarray, seed: int, epoch: int, train: bool, crops: int = 1
    ) -> Generator[np.ndarray]:
        """Yield the images (B, H, W, channels) uint8 for each row of `index` (steps, B).

        With several `crops` of each image in training, they are (B, crops, H, W, channels).
        """

    def take(self, index: np.ndarray) -> "Streamed":
        """Return only the images at the positions `index` (M,), in that order."""


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
        """The images, which must not be streamed."""
        assert isinstance(self.images, np.ndarray)
        return self.images

    def take(self, keep: np.ndarray) -> "Split":
        """Return the images at the positions `keep` (M,) int32, in that order, and their labels."""
        images = self.images
        taken = images[keep] if isinstance(images, np.ndarray) else images.take(keep)
        return Split(taken, self.labels[keep])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set.

    Attributes:
        name: its name in messages, results and the default folder of a teacher.
        train: the training split.
        test: the test split.
        validation: images held out of the training split, on which the best epoch is chosen; None
            if it is chosen on the test split.
        class_names: one per class, in the order of the labels.
        mean: (channels,) float32, the mean of the training pixels in 0..1.
        std: (channels,) float32, their standard deviation.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    validation: Split | None = None

    @property
    def evaluated(self) -> dict[str, Split]:
        """The held-out splits by name: `test`, and `validation` if there is one."""
        splits = {"test": self.test, "validation": self.validation}
        return {name: split for name, split in splits.items() if split}

    def description(self) -> dict[str, Any]:
        """Return what the user of a network trained on this data must know, ready for JSON."""
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "image_shape": list(self.train.images.shape[1:]),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }


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
    """Make a data set from NumPy arrays, after checking them.

    Args:
        train_images: (N, H, W, channels) or (N, H, W) uint8.
        train_labels: (N,) integers from 0; every class must occur.
        test_images: of the same form as `train_images`. If None, some training samples of each
            class are held out for testing (`hold_out`).
        test_labels: of the same form as `train_labels`.
        name: its name in messages, results and the default folder of a teacher.
        class_names: one per class; the default is "0", "1", ...
        mean: per channel, of pixels in 0..1; computed from the training images by default.
        std: per channel, of pixels in 0..1; computed from the training images by default.
        test_fraction: share of each class that is held out if there are no test images.

    Raises:
        UserError: something is wrong with the arrays; the message says what was found.

    Examples:
        >>> images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
        >>> dataset = ipwd_jax.from_arrays(images, labels, class_names=["cat", "dog"])
        >>> dataset.train.images.shape, dataset.test.images.shape
        ((16, 8, 8, 1), (4, 8, 8, 1))
    """
    train = _split(f"{name} training", train_images, train_labels)
    if test_images is None:
        if test_labels is not None:
            raise UserError(f"{name} has test labels, but no test images; pass both or neither")
        train, test = hold_out(train, test_fraction, name)
    else:
        test = _split(f"{name} test", test_images, test_labels)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{name}: the training images have the shape {train.images.shape[1:]}, but the test "
            f"images have {test.images.shape[1:]}; both need the same shape"
        )
    classes = int(train.labels.max()) + 1 if class_names is None else len(class_names)
    check_classes(name, classes, train.labels, test.labels)
    mean, std = np.atleast_1d(mean), np.atleast_1d(std)
    if not (len(mean) and len(std)):
        computed = _statistics(train.in_memory)
        mean, std = (mean if len(mean) else computed[0]), (std if len(std) else computed[1])
    mean, std = checked_statistics(name, train.images.shape[-1], mean, std)
    names = range(classes) if class_names is None else class_names
    return Dataset(name, train, test, tuple(map(str, names)), mean, std)


def check_classes(
    name: str, classes: int, train_labels: np.ndarray, test_labels: np.ndarray
) -> None:
    """Raise `UserError` unless there are two classes or more and every label belongs to a class.

    Every class must also have a training image.
    """
    if classes < 2:
        raise UserError(f"{name} has {classes} classes; at least 2 are needed")
    trained = set(train_labels.tolist())
    # A label that is an identifier makes for billions of classes, too many to be listed.
    absent = (label for label in range(classes) if label not in trained)
    if missing := list(itertools.islice(absent, 10)):
        raise UserError(
            f"{name} has {classes} classes, but no training image of the classes {missing}; "
            "number the classes from 0 without gaps"
        )
    labels = trained | set(test_labels.tolist())
    if beyond := sorted(label for label in labels if not 0 <= label < classes):
        raise UserError(
            f"{name} has {classes} classes, but some labels belong to none of them: {beyond[:10]}"
        )


def checked_statistics(
    name: str,
    channels: int,
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation (channels,) as float32.

    Raises:
        UserError: their number differs from `channels`, one is not finite, or a deviation is not
            positive.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if (
        mean.shape != (channels,)
        or std.shape != (channels,)
        or not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all())
    ):
        raise UserError(
            f"{name} has {channels} channels; mean and std must have one finite value per channel, "
            f"and std must be above 0; found mean {mean.tolist()} and std {std.tolist()}"
        )
    if mean.min() < 0 or mean.max() > 1 or std.max() > 1:
        raise UserError(
            f"mean and std of {name} must be in 0..1, like the pixels after a division by 255; "
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
            f"{images.shape} {images.dtype}; convert floats in 0..1 by (255 * x).astype('uint8')"
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
            f"{what} labels must start at 0 and fit into 32 bits, found {labels.min()} to "
            f"{labels.max()}"
        )
    return Split(np.ascontiguousarray(images), labels.astype(np.int32))


def hold_out(split: Split, fraction: float, name: str = "the data") -> tuple[Split, Split]:
    """Hold out the same share of every class, at even intervals in the order of its samples.

    Args:
        split: the split to divide.
        fraction: share of each class to hold out, in (0, 0.5]. At least one sample is held out of
            every class that has two or more.
        name: name of the data set in messages.

    Returns:
        The remaining split and the held-out split. They depend on nothing but the arguments.

    Raises:
        UserError: the fraction is out of range, or no class has more than one sample.
    """
    if not 0 < fraction <= 0.5:
        raise UserError(f"config.data.test_fraction must be in (0, 0.5], found {fraction}")
    held = np.zeros(len(split.labels), bool)
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        count = max(round(fraction * len(members)), int(len(members) > 1))
        held[members[(np.arange(count) + 1) * len(members) // (count + 1)]] = True
    if not held.any():
        raise UserError(
            f"every class has a single image in {name}, so none can be held out; add images, or "
            "provide a test split"
        )
    rest, out = (split.take(np.flatnonzero(part).astype(np.int32)) for part in (~held, held))
    return rest, out


def long_tailed(split: Split, ratio: float) -> Split:
    """Return a split whose classes shrink exponentially from the first to the last.

    Of C classes, the class c keeps its first `n * ratio^(-c / (C - 1))` samples, rounded down. Here
    n is the size of the largest class. This is the profile of Cui et al., 2019, and Cao et al.,
    2019, who call `1 / ratio` the imbalance factor, and draw the samples.

    Args:
        split: the split to thin out.
        ratio: size of the first class over that of the last one, at least 1.

    Raises:
        UserError: the ratio is less than 1, or so large that the last class would be empty.
    """
    sizes = np.bincount(split.labels)
    if not 1 <= ratio <= sizes.max():
        raise UserError(
            "config.data.long_tail must be 0 or the ratio of the largest to the smallest class, "
            f"in 1..{sizes.max()} for this data; found {ratio:g}"
        )
    keep = np.zeros(len(split.labels), bool)
    for label in range(len(sizes)):
        wanted = sizes.max() * ratio ** (-label / max(1, len(sizes) - 1))
        wanted = int(wanted + 1e-9)  # 49 * 49 ** -1 is less than 1
        keep[np.flatnonzero(split.labels == label)[:wanted]] = True
    return split.take(np.flatnonzero(keep).astype(np.int32))


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of the pixels in 0..1, per channel.

    The deviation of a constant channel is given as 1.
    """
    # Counting how often each of the 256 values occurs keeps the sums exact.
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
    """Return a checksum of all that training and evaluation read, in 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    splits = [dataset.train, *dataset.evaluated.values()]
    digest.update(repr(tuple(split.images.shape for split in splits)).encode())
    for split in splits:
        if isinstance(split.images, np.ndarray):
            digest.update(np.ascontiguousarray(split.images).data)
        else:
            digest.update(split.images.fingerprint.encode())
        digest.update(split.labels.tobytes())
    digest.update(dataset.mean.tobytes() + dataset.std.tobytes())
    digest.update(repr(len(dataset.class_names)).encode())
    return digest.hexdigest()
