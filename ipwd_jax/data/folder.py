"""Folders of image files, one folder per class."""

import pathlib

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data.base import Dataset, from_arrays
from ipwd_jax.errors import UserError

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
            raise UserError(f"{root} has no folder {config.train_split}; it has {_folders(root)}")
        train_root, test_root = root, None
    else:
        candidates = [config.test_split] if config.test_split else ["test", "val", "validation"]
        test_root = next((root / c for c in candidates if (root / c).is_dir()), None)
        if config.test_split and test_root is None:
            raise UserError(f"{root} has no folder {config.test_split}; it has {_folders(root)}")
    names = _folders(train_root)
    if test_root is not None and _folders(test_root) != names:
        differ = sorted(set(names) ^ set(_folders(test_root)))
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


def _folders(root: pathlib.Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read(root: pathlib.Path, names: list[str], image_size: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels, files = [], [], []
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
        images += [_decode(file, image_size) for file in found]
    if not images:
        raise UserError(f"{root} has no class folders")
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise UserError(
            f"images in {root} are of {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]} pixels; "
            "bring them to one with, for example, --config.data.image_size=64"
        )
    return np.stack(images), np.array(labels, np.int32)


def _decode(file: pathlib.Path, image_size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # convert() would clip at 255 what goes to 65,535
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise UserError(f"{file} has pixels of mode {image.mode}, of unknown range")
            image = image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{file} cannot be read as an image: {error}") from error
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
