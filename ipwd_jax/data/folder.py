"""Image files in one folder per class."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ipwd_jax.data import memory
from ipwd_jax.data.base import (
    TEST_FRACTION,
    Dataset,
    Split,
    check_classes,
    from_arrays,
    hold_out,
)
from ipwd_jax.errors import UserError, warn

if TYPE_CHECKING:
    from PIL import Image

# Names of splits besides "train", in lower case.
_SPLITS = {"dev", "eval", "test", "testing", "training", "val", "valid", "validation"}
_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}


class Files(NamedTuple):
    """The image files of a split, which are below `root`, and their labels (N,) int32."""

    root: pathlib.Path
    paths: Sequence[pathlib.Path]
    labels: np.ndarray


def folder(config: ConfigDict, path: str) -> Dataset:
    """Read `PATH/train/CLASS/*.jpg` and `PATH/test|val|validation/CLASS/*.jpg`, or `PATH/CLASS/*`.

    The classes are the folder names in alphabetical order, and the files of a class are also read
    in alphabetical order. Hidden files and folders are ignored, and so are files without the suffix
    of a common image format. All images are converted to RGB and rotated as their EXIF data says;
    of an animation, the first frame is read.

    Args:
        config: `image_size` > 0 resizes the shorter side (bilinear, antialiased) and cuts out the
            centre square; 0 requires images of one size. `test_fraction` applies if there are no
            separate test images.
        path: the folder `PATH` above.

    Raises:
        UserError: the folder or its images are missing, a file cannot be read, the classes or the
            sizes do not agree, or the images do not fit into memory.
    """
    name, class_names, train, test = find(config, path)
    images = _decode_all(train.root, [*train.paths, *test.paths], config.image_size)
    count = len(train.paths)
    return from_arrays(
        images[:count],
        train.labels,
        images[count:],
        test.labels,
        name=name,
        class_names=class_names,
        mean=config.mean,
        std=config.std,
    )


def find(config: ConfigDict, path: str) -> tuple[str, list[str], Files, Files]:
    """Find the images of a data set without opening them.

    Args:
        config: as in `folder`.
        path: as in `folder`.

    Returns:
        Its name, the names of its classes, its training files and its test files.

    Raises:
        UserError: the folder or its images are missing, or the classes do not agree or are fewer
            than two.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; config.data.name=folder:PATH must name a folder of class "
            "folders, or of splits that hold them"
        )
    name = root.resolve().name
    train_root, test_root = _split_folders(config, root)
    names = class_folders(train_root)
    if strange := [name for name in names if name != name.encode(errors="ignore").decode()]:
        raise UserError(
            f"the names of these class folders in {train_root} are not UTF-8: {strange[:10]!a}; "
            "rename them"
        )
    if test_root is not None and class_folders(test_root) != names:
        differ = sorted(set(names) ^ set(class_folders(test_root)))
        raise UserError(
            f"{train_root} and {test_root} must have the same class folders; these are in one of "
            f"the two only: {differ[:10]}"
        )
    train = Files(train_root, *image_files(train_root, names))
    if test_root is not None:
        test = Files(test_root, *image_files(test_root, names))
    else:
        numbered = Split(np.arange(len(train.paths)), train.labels)
        train, test = (
            Files(train_root, [train.paths[i] for i in part.in_memory], part.labels)
            for part in hold_out(numbered, config.test_fraction, str(train_root))
        )
    check_classes(name, len(names), train.labels, test.labels)
    return name, names, train, test


def _split_folders(
    config: ConfigDict, root: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path | None]:
    """Return the folders of the training and the test split; None if test images are held out."""
    for split in (config.train_split, config.test_split):
        if split and not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split!r}; it has {class_folders(root)}")
    train = root / (config.train_split or "train")
    if not train.is_dir():
        if config.test_split:
            raise UserError(
                f"config.data.test_split is {config.test_split!r}, but {root} has no folder "
                "'train' beside it; name the training split with --config.data.train_split"
            )
        _check_no_split(root)
        return root, None
    if not config.train_split and not class_folders(train):
        raise UserError(
            f"{train} has no class folders; put the images of each class into a folder of their "
            f"own there, or set --config.data.train_split=. if {root} holds the class folders"
        )
    if config.test_split and root / config.test_split == train:
        raise UserError(
            f"config.data.test_split is {config.test_split!r}, like the training split; choose "
            "another folder"
        )
    candidates = [config.test_split] if config.test_split else ["test", "val", "validation"]
    candidates = [name for name in candidates if root / name != train]
    test = next((root / name for name in candidates if (root / name).is_dir()), None)
    folders = [x for x in class_folders(root) if root / x not in (train, test)]
    unused = [x for x in folders if x.lower() in _SPLITS]
    if unused and not config.test_split:
        tested = test or "images held out of the training split"
        warn(
            f"{root} has the folder {unused[0]!r} too, which is not used: the test images are "
            f"{tested}; choose others with --config.data.test_split"
        )
    if test is not None and config.test_fraction != TEST_FRACTION:
        raise UserError(
            f"config.data.test_fraction is {config.test_fraction}, but nothing is held out because "
            f"there is a test split, {test}; leave the setting out"
        )
    return train, test


def _check_no_split(root: pathlib.Path) -> None:
    """Raise `UserError` if a folder that is to hold class folders seems to hold splits."""
    for name in class_folders(root):
        if name.lower() in _SPLITS and class_folders(root / name):
            raise UserError(
                f"{root} has the folder {name!r} with folders in it, which looks like a split, but "
                "no folder 'train'; name the splits with --config.data.train_split and "
                "--config.data.test_split"
            )


def class_folders(root: pathlib.Path) -> list[str]:
    """Return the names of the classes below a folder, in the order of their labels."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(root: pathlib.Path, names: list[str]) -> tuple[list[pathlib.Path], np.ndarray]:
    """Return the image files of the classes `names` below `root`, and their labels (N,) int32.

    Links to files and folders are followed. Hidden files and everything in hidden folders are
    ignored. Broken links are ignored with a warning.

    Raises:
        UserError: there are no classes, or a class has no image files.
    """
    labels, files = [], []
    dangling = [p for p in root.glob("[!.]*") if p.is_symlink() and not p.exists()]
    empty = None
    for label, name in enumerate(names):
        found = []
        for path in _visible_files(root / name):
            if path.suffix.lower() in _SUFFIXES:
                if path.is_file():
                    found.append(path)
                elif path.is_symlink() and not path.exists():
                    dangling.append(path)
        empty = empty or (None if found else root / name)
        files += sorted(found)
        labels += [label] * len(found)
    if dangling:
        warn(f"{len(dangling)} broken links in {root} are ignored, among them {min(dangling)}")
    if empty:
        raise UserError(f"the class folder {empty} has no image files")
    if not files:
        raise UserError(f"{root} has no class folders")
    return files, np.array(labels, np.int32)


def _visible_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the files below a folder that are not hidden, in links to folders too."""

    def cannot_be_read(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, files in os.walk(root, onerror=cannot_be_read, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(real)
        # In an order that decides by which name a folder with several links to it is found.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # macOS puts ._NAME beside NAME.
        yield from (pathlib.Path(folder, name) for name in files if not name.startswith("."))


def _decode_all(root: pathlib.Path, files: Sequence[pathlib.Path], image_size: int) -> np.ndarray:
    """Decode files to images (N, H, W, 3) uint8, which must have one size or are resized to one."""
    height, width = (image_size,) * 2 if image_size else _decode(files[0], 0).shape[:2]
    memory.check(
        f"the {len(files)} images of {height}x{width} pixels in {root}",
        len(files) * height * width * 3,
        "choose a smaller --config.data.image_size, or decode the images during training with "
        "--config.data.streaming",
    )
    images, sizes = np.empty((len(files), height, width, 3), np.uint8), set()
    for row, file in zip(images, files, strict=True):
        image = _decode(file, image_size)
        sizes.add(image.shape[:2])
        if len(sizes) == 1:
            row[:] = image
    if len(sizes) > 1:
        raise UserError(
            f"the images in {root} have {len(sizes)} sizes, from {min(sizes)} to {max(sizes)} "
            "pixels; resize them to one size, for example with --config.data.image_size=64"
        )
    return images


def _decode(file: pathlib.Path, image_size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with file.open("rb") as encoded:  # Pillow leaves a file open that cannot be read
            image = to_rgb(encoded)
    except UserError as error:
        raise UserError(f"{file} {error}") from error
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{file} cannot be read as an image: {error}") from error
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def to_rgb(file: BinaryIO) -> "Image.Image":
    """Decode a file of any format that Pillow reads to RGB, rotated as its EXIF data says.

    Raises:
        UserError: the range of the pixel values is unknown.
        Exception: Pillow cannot read the file.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # convert() would clip values of up to 65,535 at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise UserError(
                f"has pixels of mode {image.mode}, whose range is unknown; save it with 8 bits per "
                "channel"
            )
        return image.convert("RGB")
