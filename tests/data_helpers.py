"""Data sets, image files and streamed batches for the tests of several modules."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipwd_jax import config as config_lib
from ipwd_jax import data
from ipwd_jax.data import streaming
from ipwd_jax.errors import UserError

TFDS = Path(__file__).parent / "files" / "tfds"
SIZE = 24  # height and width, in pixels, of the streamed images


def config(name, **settings):
    """Return `config.data` of a run that reads the source `name`."""
    made = config_lib.default().data
    made.update({"name": name, **settings})
    return made


def load(name, **settings):
    """Read the source `name` with these settings."""
    return data.load(config(name, **settings))


def fails(words, name, **settings):
    """Check that the source `name` is refused with a message that has all of `words`."""
    with pytest.raises(UserError) as error:
        load(name, **settings)
    for word in words:
        assert word in str(error.value), str(error.value)


def arrays(size=12, classes=3, shape=(6, 6, 3)):
    """Return `size` images of noise and their labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (size, *shape), np.uint8), np.arange(size) % classes


def same(a, b):
    """Return whether two data sets have the same images and labels."""
    return all(
        np.array_equal(getattr(a, split).images, getattr(b, split).images)
        and np.array_equal(getattr(a, split).labels, getattr(b, split).labels)
        for split in ("train", "test")
    )


def write_image(path, image=None, **options):
    """Write `image`, or a grey one of 6x6 pixels, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image or Image.fromarray(np.full((6, 6, 3), 200, np.uint8))
    image.save(path, **options)


def write_images(root, *places, side=6):
    """Write a black square image to each of `places` below `root`."""
    for place in places:
        write_image(root / place, Image.new("RGB", (side, side)))


def write_two_classes(root):
    """Write 40 training and 12 test images of two classes, as PNG files of different sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 180, (12 + i % 3, 14, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")


def encode(pixels, kind="JPEG", **options):
    """Return the contents of an image file; the default is a JPEG of high quality."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def noise(count=10, side=40):
    """Return `count` colour images of random pixels."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def run(records, index, **settings):
    """Return the batches that streaming `records` yields for the rows of `index`."""
    settings = {"seed": 1, "epoch": 2, "size": SIZE, "train": True, "threads": 2, **settings}
    return list(streaming.batches(records, np.asarray(index, np.int32), **settings))
