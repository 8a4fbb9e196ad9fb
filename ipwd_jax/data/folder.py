"""Folders of image files, one folder per class."""

import pathlib
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data.base import Dataset, from_arrays
from ipwd_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}


def folder(config: ConfigDict, path: str) -> Dataset:
    """Read `PATH/train/CLASS/*.jpg` and `PATH/test|val|validation/CLASS/*.jpg`, or `PATH/CLASS/*`.

    Classes are the folder names in alphabetic order, files are read in alphabetic order. Any
    format that Pillow knows becomes RGB: the first frame of an animation, turned as its EXIF says.

    Args:
        config: `image_size` > 0 resizes the shorter side (bilinear, antialiased) and cuts the
            centre square; 0 needs images of one size. `test_fraction` counts where there are no
            separate test images.
        path: as above.

    Raises:
        UserError: nothing there, unreadable files, classes or sizes that do not agree.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no folder {root}; config.data.name=folder:PATH names one of class folders"
        )
    train_root = root / (config.train_split or "train")
    if not train_root.is_dir():
        if config.train_split:
            raise UserError(
                f"{root} has no folder {config.train_split}; it has {class_folders(root)}"
            )
        train_root, test_root = root, None
    else:
        candidates = [config.test_split] if config.test_split else ["test", "val", "validation"]
        test_root = next((root / c for c in candidates if (root / c).is_dir()), None)
        if config.test_split and test_root is None:
            raise UserError(
                f"{root} has no folder {config.test_split}; it has {class_folders(root)}"
            )
    names = class_folders(train_root)
    if test_root is not None and class_folders(test_root) != names:
        differ = sorted(set(names) ^ set(class_folders(test_root)))
        raise UserError(f"classes in one of {train_root} and {test_root} only: {differ[:10]}")
    train = _read(train_root, names, config.image_size)
    test = _read(test_root, names, config.image_size) if test_root else (None, None)
    return from_arrays(
        *train,
        *test,
        name=root.resolve().name,
        class_names=names,
        mean=config.mean,
        std=config.std,
        test_fraction=config.test_fraction,
    )


def class_folders(root: pathlib.Path) -> list[str]:
    """Names of the classes below a folder, in the order of their labels."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(root: pathlib.Path, names: list[str]) -> tuple[list[pathlib.Path], np.ndarray]:
    """The image files of the classes `names` below `root`, and their labels (N,) int32.

    Raises:
        UserError: there are no classes, or one has no image files.
    """
    labels, files = [], []
    for label, name in enumerate(names):
        found = sorted(
            p
            for p in (root / name).rglob("[!.]*")  # macOS leaves ._NAME beside NAME
            if p.suffix.lower() in _SUFFIXES and p.is_file()
        )
        if not found:
            raise UserError(f"the class folder {root / name} has no image files")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{root} has no class folders")
    return files, np.array(labels, np.int32)


def _read(root: pathlib.Path, names: list[str], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    files, labels = image_files(root, names)
    images = [_decode(file, image_size) for file in files]
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise UserError(
            f"images in {root} are of {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]} pixels; "
            "bring them to one with, for example, --config.data.image_size=64"
        )
    return np.stack(images), labels


def _decode(file: pathlib.Path, image_size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        image = to_rgb(file)
    except UserError as error:
        raise UserError(f"{file} {error}") from error
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{file} cannot be read as an image: {error}") from error
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(file: pathlib.Path | BinaryIO) -> "Image.Image":
    """Decode a file of any format that Pillow knows: RGB, turned as its EXIF says.

    Raises:
        UserError: the range of its pixels is unknown.
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # convert() would clip at 255 what goes to 65,535
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(f"has pixels of mode {image.mode}, of unknown range")
        return image.convert("RGB")
