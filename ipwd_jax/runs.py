"""The results, the history and the trained classifier of a run, for notebooks and other programs.

For example:

    run = ipwd_jax.load_run("runs/digits_ipwd_resnet20_resnet8_seed0")
    run.result["last"]["top1"], run.history[-1]["test_top1"]
    run.classifier().predict(["cat.jpg", "dog.jpg"]).names
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from ipwd_jax import models, precision
from ipwd_jax.checkpoint import load_network
from ipwd_jax.config import filled
from ipwd_jax.data import augment
from ipwd_jax.data.decode import decode_eval
from ipwd_jax.data.folder import to_rgb
from ipwd_jax.errors import UserError
from ipwd_jax.state import network_shapes
from ipwd_jax.student import network_of
from ipwd_jax.typing import PyTree

ImageLike = np.ndarray | jax.Array | str | pathlib.Path | Image.Image


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a classifier for N images.

    Attributes:
        probabilities: (N, C) float32.
        labels: (N,) int, the most probable class of each image.
        names: the name of each of these classes.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, with everything that is needed to classify an image.

    Attributes:
        network: the Flax module.
        variables: `params` and `batch_stats` of the module.
        class_names: names of the classes, in the order of the logits.
        image_shape: (H, W, channels) of the images on which the network was trained.
        mean: (channels,), which is subtracted from the pixels in 0..1.
        std: (channels,), by which the difference is divided.
        centre_crop: whether files and Pillow images are resized and cropped like streamed test
            images, which cuts off a margin. Otherwise, they are cropped only as far as is necessary
            to give them the proportions of `image_shape`.
    """

    network: nn.Module
    variables: PyTree
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    centre_crop: bool = False

    def logits(self, images: jax.Array) -> jax.Array:
        """Return the logits (N, C) float32 of images (N, H, W, channels) with pixels in 0..255.

        This is a JAX function, which can be compiled, differentiated and exported.
        """
        with precision.of_products("float32"):
            mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
            outputs: Any = self.network.apply(self.variables, augment.normalize(images, mean, std))
            return outputs.logits

    def predict(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 500
    ) -> Predictions:
        """Classify images.

        Args:
            images: a uint8 array (N, H, W, channels) or (H, W, channels), a file, a Pillow image,
                or several single images. Files and Pillow images are resized and cropped like the
                test images of the run; arrays must have the size of the training images.
            batch_size: number of images that the device processes at once.

        Raises:
            UserError: a file cannot be read, an array has another shape or type, or there is no
                image.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, found {batch_size}")
        pixels, parts = self._pixels(images), []
        for start in range(0, len(pixels), batch_size):
            rows = pixels[start : start + batch_size]
            missing = min(batch_size, len(pixels)) - len(rows)  # for a single compilation
            padded = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), np.uint8)])
            parts.append(np.asarray(self._softmax(padded))[: len(rows)])
        probabilities = np.concatenate(parts)
        labels = probabilities.argmax(axis=1)
        return Predictions(probabilities, labels, [self.class_names[label] for label in labels])

    @functools.cached_property
    def _softmax(self) -> Callable[[np.ndarray], jax.Array]:
        """The compiled function from images to probabilities, with the variables on the device."""

        def compute(variables: PyTree, images: jax.Array) -> jax.Array:
            return jax.nn.softmax(dataclasses.replace(self, variables=variables).logits(images))

        return functools.partial(jax.jit(compute), jax.device_put(self.variables))

    def _pixels(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
        """Return the images as one array (N, H, W, channels) uint8."""
        if isinstance(images, np.ndarray | jax.Array):
            images = images[None] if images.ndim == len(self.image_shape) else images
        elif isinstance(images, str | pathlib.Path | Image.Image):
            images = [images]
        else:
            images = list(images) if isinstance(images, Iterable) else [images]
        if not len(images):
            raise UserError("there is no image to classify: the list is empty")
        return np.stack([self._one(image) for image in images])

    def _one(self, image: ImageLike) -> np.ndarray:
        if isinstance(image, np.ndarray | jax.Array):
            if image.dtype != np.uint8 or image.shape != self.image_shape:
                raise UserError(
                    f"an array of images must be uint8 with images of shape {self.image_shape}, "
                    f"found {image.dtype} and {image.shape}; pass files or Pillow images to have "
                    "them resized"
                )
            return np.asarray(image)
        if not isinstance(image, str | pathlib.Path | Image.Image):
            raise UserError(
                "an image must be a file name, a Pillow image or an array, found a value of type "
                f"{type(image).__name__}"
            )
        height, width, channels = self.image_shape
        if channels not in (1, 3):
            raise UserError(
                f"the network takes images of {channels} channels, which files and Pillow images "
                f"do not have; pass uint8 arrays of shape {self.image_shape}"
            )
        try:
            encoded = _encoded(image)
            if self.centre_crop:
                pixels = Image.fromarray(decode_eval(encoded, height))
            else:
                pixels = to_rgb(io.BytesIO(encoded))
        except UserError as error:
            raise UserError(f"{image} {error}") from error
        except Exception as error:  # Pillow raises many types
            raise UserError(f"{image} cannot be read as an image: {error}") from error
        if pixels.size != (width, height):
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels.convert("L" if channels == 1 else "RGB")).reshape(self.image_shape)


def _encoded(image: str | pathlib.Path | Image.Image) -> bytes:
    """Return the bytes of a file, or of a PNG file with the pixels of a Pillow image, upright."""
    if isinstance(image, Image.Image):
        file, upright = io.BytesIO(), ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F"):
            raise UserError(
                f"has the Pillow mode {upright.mode}, whose pixels have an unknown range; convert "
                "it to 8 bits per channel"
            )
        keeps = upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA") or "16" in upright.mode
        (upright if keeps else upright.convert("RGB")).save(file, "PNG")
        return file.getvalue()
    try:
        # Unlike `Path.expanduser`, this leaves names such as ~photo.jpg alone.
        return pathlib.Path(os.path.expanduser(image)).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left in its work directory.

    Attributes:
        workdir: the work directory.
        config: the config of the run; settings that are newer than the run have their defaults.
        data: name, class names, image shape, mean and standard deviation of its data; empty if the
            network was imported or trained by an older version.
        result: the content of `result.json`; empty while the run is not finished.
    """

    workdir: pathlib.Path
    config: ConfigDict
    data: dict[str, Any]
    result: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row of metrics per epoch, from `metrics.csv`; numbers are floats.

        `pandas.DataFrame(run.history)` turns it into a table.
        """
        return self._rows("metrics.csv")

    @property
    def classes(self) -> list[dict[str, Any]]:
        """One row per class, from `classes.csv`, which `SeedRun.of_classes` describes.

        Empty while the run is not finished, and if an older version trained it.
        """
        return self._rows("classes.csv")

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.workdir / name
        if not path.exists():
            return []
        with path.open() as file:
            rows = list(csv.DictReader(file))
        return [{k: v if k == "class" else _number(v) for k, v in row.items() if v} for row in rows]

    def predictions(self) -> dict[str, np.ndarray]:
        """Return the logits on the test set, and its labels.

        Returns:
            `last_logits`, `best_logits` and, if the run has a teacher, `teacher_logits`, each
            (N, C), and `labels` (N,).

        Raises:
            UserError: the run is not finished.
        """
        return self._arrays("predictions.npz")

    def samples(self) -> dict[str, np.ndarray]:
        """Return the label, the weight and other records of the training samples.

        `SeedRun.samples` describes them.

        Raises:
            UserError: the run is not finished, or does not weight its samples.
        """
        return self._arrays("samples.npz")

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        try:
            with (self.workdir / name).open("rb") as file, np.load(file) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            raise UserError(
                f"{self.workdir} has no {name}; a run writes this file when it finishes, and "
                "samples.npz only if it weights its samples"
            ) from None
        except Exception as error:  # NumPy and zipfile raise many types
            raise UserError(f"{self.workdir / name} cannot be read: {error}") from error

    def classifier(self, which: str = "last") -> Classifier:
        """Return the trained network, ready to classify images.

        Args:
            which: the epoch from which the network is taken, "last" or "best".

        Raises:
            UserError: `which` is something else, there is no readable checkpoint, or it is not
                recorded on which data the network was trained, as for an imported one.
        """
        if which not in ("last", "best"):
            raise UserError(f"`which` must be 'last' or 'best', found {which!r}")
        if not self.data:
            raise UserError(
                f"{self.workdir} does not record the class names of its network and how to "
                "normalise images for it. If an older version trained the network, run its command "
                "again, which adds this record without training; if the network was imported, "
                "create an ipwd_jax.runs.Classifier"
            )
        models.check_run(self.workdir, self.config.model.name)
        shape = tuple(self.data["image_shape"])
        network = network_of(self.config, len(self.data["class_names"]), shape)
        variables, _ = load_network(self.workdir, which, network_shapes(network, shape))
        return Classifier(
            network,
            jax.device_get(variables),
            tuple(self.data["class_names"]),
            shape,
            np.asarray(self.data["mean"], np.float32),
            np.asarray(self.data["std"], np.float32),
            centre_crop=self.config.data.streaming,
        )


def _number(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def load_run(workdir: str | pathlib.Path) -> Run:
    """Read what a run has left in its work directory, whether or not it is finished.

    Raises:
        UserError: the directory is missing, or holds no run or a damaged one.

    Examples:
        >>> run = ipwd_jax.load_run("runs/mine")
        >>> run.history[-1]["test_top1"] == run.result["last"]["top1"]
        True
    """
    workdir = pathlib.Path(workdir).expanduser()
    path, result = workdir / "config.json", {}
    try:
        noted = json.loads(path.read_text())
        config, data = ConfigDict(filled(noted["config"])), noted.get("data", {})
        if (workdir / "result.json").exists():
            path = workdir / "result.json"
            result = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is not the work directory of a run: {path} is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); check that {workdir} is the work directory of a run"
        ) from error
    return Run(workdir, config, data, result)


def load_student(workdir: str | pathlib.Path, which: str = "last") -> Classifier:
    """Return the network that a run trained, as `load_run(workdir).classifier(which)` does.

    Examples:
        >>> student = ipwd_jax.load_student("runs/mine")
        >>> prediction = student.predict(np.zeros(student.image_shape, np.uint8))
        >>> prediction.probabilities.shape == (1, len(student.class_names))
        True
    """
    return load_run(workdir).classifier(which)
