"""Data that is already stored as arrays: scikit-learn's digits, and NumPy files."""

import pathlib
import zipfile

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import memory
from ipwd_jax.data.base import TEST_FRACTION, Dataset, from_arrays
from ipwd_jax.errors import UserError


def digits(config: ConfigDict) -> Dataset:
    """Load 1,797 real handwritten digits, 8x8 pixels in grey: 1,438 for training, 359 for testing.

    They come with scikit-learn, so nothing is downloaded, and are the test set of UCI's Optical
    Recognition of Handwritten Digits (Kaynak, 1995).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return from_arrays(images, bunch.target, name="digits", mean=config.mean, std=config.std)


def numpy_file(config: ConfigDict, path: str) -> Dataset:
    """Read the arrays `train_images` and `train_labels` of a NumPy archive.

    The arrays `test_images`, `test_labels` and `class_names` (strings) are optional. `from_arrays`
    describes the shapes, and what happens if there is no test split. Pickled objects are refused.

    Args:
        config: `test_fraction` applies if the archive has no test images.
        path: an `.npz` file.

    Raises:
        UserError: the file is missing, damaged or too large for the memory, or lacks an array; or
            its arrays are wrong.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"there is no file {file}; config.data.name=numpy:PATH.npz must name a NumPy archive"
        )
    arrays = _load(file)
    if missing := {"train_images", "train_labels"} - arrays.keys():
        raise UserError(f"{file} lacks the arrays {sorted(missing)}; it has {sorted(arrays)}")
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise UserError(
            f"{file} has only one of test_images and test_labels; store both of them or neither"
        )
    if "test_images" in arrays and config.test_fraction != TEST_FRACTION:
        raise UserError(
            f"config.data.test_fraction is {config.test_fraction}, but nothing is held out because "
            f"{file} has test images; leave the setting out"
        )
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise UserError(
            f"{file}: class_names must be one string for each class, found {names.shape} "
            f"{names.dtype}; store a list of strings, or leave the array out"
        )
    return from_arrays(
        arrays["train_images"],
        arrays["train_labels"],
        arrays.get("test_images"),
        arrays.get("test_labels"),
        name=file.stem,
        class_names=None if names is None else [str(name) for name in names],
        mean=config.mean,
        std=config.std,
        test_fraction=config.test_fraction,
    )


def _load(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        # Holding out a part of the images copies them.
        copied = 0 if "test_images.npy" in sizes else sizes.get("train_images.npy", 0)
        memory.check(
            f"the arrays in {file}",
            sum(sizes.values()) + copied,
            "store the images in files and decode them during training, with "
            "--config.data.name=folder:PATH and --config.data.streaming",
        )
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        raise UserError(f"{file} cannot be read as a NumPy archive: {error}") from error
