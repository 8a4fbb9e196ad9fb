"""Data that is already an array: scikit-learn's digits, and NumPy files."""

import pathlib
import zipfile

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import memory
from ipwd_jax.data.base import TEST_FRACTION, Dataset, from_arrays
from ipwd_jax.errors import UserError


def digits(config: ConfigDict) -> Dataset:
    """1,797 handwritten digits, 8x8 grey, real and without a download; 1,438 train, 359 test.

    From scikit-learn: the test set of Kaynak, 1995, UCI Optical Recognition of Handwritten Digits.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # stored in 0..16
    return from_arrays(images, bunch.target, name="digits", mean=config.mean, std=config.std)


def numpy_file(config: ConfigDict, path: str) -> Dataset:
    """Arrays `train_images`, `train_labels` and, if there, `test_images`, `test_labels`.

    Optional: `class_names`, strings. See `from_arrays` for shapes and what happens without a test
    split. Nothing pickled is read.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no file {file}; config.data.name=numpy:PATH.npz names a NumPy archive")
    arrays = _load(file)
    if missing := {"train_images", "train_labels"} - arrays.keys():
        raise UserError(f"{file} lacks {sorted(missing)}; it has {sorted(arrays)}")
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise UserError(f"{file} has one of test_images and test_labels; both or none are needed")
    if "test_images" in arrays and config.test_fraction != TEST_FRACTION:
        raise UserError(
            f"config.data.test_fraction is {config.test_fraction}, but nothing is held out, since "
            f"{file} has test images; leave the setting out"
        )
    names = arrays.get("class_names")
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
        # Images are copied when some of them are held out.
        copied = 0 if "test_images.npy" in sizes else sizes.get("train_images.npy", 0)
        memory.check(
            f"the arrays in {file}",
            sum(sizes.values()) + copied,
            "have images in files decoded while training, with --config.data.name=folder:PATH and "
            "--config.data.streaming",
        )
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise UserError(f"{file} cannot be read as a NumPy archive: {error}") from error
