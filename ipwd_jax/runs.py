"""Runs as a notebook or another program reads them: results, history, and the trained classifier.

run = ipwd_jax.load_run("runs/digits_ipwd_resnet20_resnet8_seed0")
run.result["last"]["top1"], run.history[-1]["test_top1"]
run.classifier().predict(["cat.jpg", "dog.jpg"]).names
"""

import contextlib
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from ipwd_jax import models, precision
from ipwd_jax.checkpoint import load_network
from ipwd_jax.data import augment
from ipwd_jax.data.decode import decode_eval
from ipwd_jax.data.folder import to_rgb
from ipwd_jax.errors import UserError
from ipwd_jax.state import network_shapes
from ipwd_jax.typing import PyTree

ImageLike = np.ndarray | str | pathlib.Path | Image.Image


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a classifier says of N images.

    Attributes:
        probabilities: (N, C) float32.
        labels: (N,) int, the most probable class of each.
        names: its name.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network with everything that it needs to classify an image.

    Attributes:
        network: the Flax module.
        variables: of the module, `params` and `batch_stats`.
        class_names: in the order of the logits.
        image_shape: (H, W, channels) of the images that it was trained on.
        mean: (channels,) of the training pixels in 0..1, which it subtracts.
        std: (channels,) by which it divides.
        centre_crop: whether files are resized and cropped as for streamed data, which leaves a
            margin away, or as a whole.
    """

    network: nn.Module
    variables: PyTree
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    centre_crop: bool = False

    def logits(self, images: jax.Array) -> jax.Array:
        """Logits (N, C) float32 of images (N, H, W, channels), pixels from 0 to 255.

        It is a JAX function, which can be compiled, differentiated and exported.
        """
        with precision.of_products("float32"):
            mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
            outputs: Any = self.network.apply(self.variables, augment.normalize(images, mean, std))
            return outputs.logits

    def predict(
        self, images: ImageLike | Sequence[ImageLike], batch_size: int = 500
    ) -> Predictions:
        """Classifies images.

        Args:
            images: an array (N, H, W, channels) or (H, W, channels) of uint8, a file, a Pillow
                image, or a list of these. Files and Pillow images are resized and cropped as the
                test images of the run were; arrays must have the size of the training images.
            batch_size: images that the device sees at once.

        Raises:
            UserError: a file cannot be read, or an array has another shape or type.
        """
        pixels = self._pixels(images)
        compiled = jax.jit(lambda x: jax.nn.softmax(self.logits(x)))
        parts = []
        for start in range(0, len(pixels), batch_size):
            rows = pixels[start : start + batch_size]
            missing = min(batch_size, len(pixels)) - len(rows)  # one shape, one compilation
            padded = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), np.uint8)])
            parts.append(np.asarray(compiled(jnp.asarray(padded)))[: len(rows)])
        probabilities = np.concatenate(parts)
        labels = probabilities.argmax(axis=1)
        return Predictions(probabilities, labels, [self.class_names[label] for label in labels])

    def _pixels(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """The images as one array (N, H, W, channels) uint8."""
        if isinstance(images, np.ndarray):
            images = images[None] if images.ndim == len(self.image_shape) else images
        elif isinstance(images, str | pathlib.Path | Image.Image):
            images = [images]
        if not len(images):
            raise UserError("there is no image to classify: the list is empty")
        return np.stack([self._one(image) for image in images])

    def _one(self, image: ImageLike) -> np.ndarray:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.shape != self.image_shape:
                raise UserError(
                    f"an array of images must be uint8 with images of shape {self.image_shape}, "
                    f"found {image.dtype} and {image.shape}; pass files or Pillow images to have "
                    "them resized"
                )
            return image
        height, width, channels = self.image_shape
        if self.centre_crop:
            pixels = Image.fromarray(decode_eval(_encoded(image), height))
        else:
            pixels = _opened(image)
            if pixels.size != (width, height):
                pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels.convert("L" if channels == 1 else "RGB")).reshape(self.image_shape)


def _opened(image: str | pathlib.Path | Image.Image) -> Image.Image:
    encoded = _encoded(image)
    try:
        return to_rgb(io.BytesIO(encoded))
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{image} cannot be read as an image: {error}") from error


def _encoded(image: str | pathlib.Path | Image.Image) -> bytes:
    """The bytes of a file, or of one that holds the same pixels as a Pillow image."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
    try:
        return pathlib.Path(image).read_bytes()
    except OSError as error:
        raise UserError(f"{image} cannot be read: {error.strerror or error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left in its work directory.

    Attributes:
        workdir: the directory.
        config: its settings.
        data: name, class names, image shape, mean and deviation of its data; empty for an imported
            network.
        result: what `result.json` holds; empty while the run is not finished.
    """

    workdir: pathlib.Path
    config: ConfigDict
    data: dict[str, Any]
    result: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row of metrics per epoch, from `metrics.csv`; numbers are floats.

        `pandas.DataFrame(run.history)` makes a table of it.
        """
        path = self.workdir / "metrics.csv"
        if not path.exists():
            return []
        with path.open() as file:
            return [{k: _number(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def predictions(self) -> dict[str, np.ndarray]:
        """`last_logits`, `best_logits` and `teacher_logits` (N, C) on the test set, `labels` (N,).

        Raises:
            UserError: the run is not finished.
        """
        return self._arrays("predictions.npz")

    def samples(self) -> dict[str, np.ndarray]:
        """Weight, label and further records of every training sample; see `SeedRun.samples`.

        Raises:
            UserError: the run is not finished, or weights no samples.
        """
        return self._arrays("samples.npz")

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        try:
            with np.load(self.workdir / name) as file:
                return dict(file)
        except FileNotFoundError:
            raise UserError(f"{self.workdir} has no {name}; is the run finished?") from None
        except Exception as error:  # NumPy and zipfile raise many kinds
            raise UserError(f"{self.workdir / name} cannot be read: {error}") from error

    def classifier(self, which: str = "last") -> Classifier:
        """The trained network, ready to classify images.

        Args:
            which: "last" or "best" epoch.

        Raises:
            UserError: there is no readable checkpoint, or it is not known on which data the
                network was trained, as of an imported one.
        """
        if which not in ("last", "best"):
            raise UserError(f"which epoch is 'last' or 'best', found {which!r}")
        if not self.data:
            raise UserError(
                f"{self.workdir} does not say which classes its network knows and how to normalise "
                "images for it. If it is a run of an older version, start its command again, which "
                "adds this and trains nothing; if it was imported, make an ipwd_jax.runs.Classifier"
            )
        shape = tuple(self.data["image_shape"])
        network = models.create(self.config.model.name, len(self.data["class_names"]))
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
    """Reads what a run has left in its work directory, whether or not it is finished.

    Raises:
        UserError: the directory is missing, holds no run or a damaged one.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    try:
        noted = json.loads(path.read_text())
        config, data = ConfigDict(noted["config"]), noted.get("data", {})
        result_path = workdir / "result.json"
        result = json.loads(result_path.read_text()) if result_path.exists() else {}
    except FileNotFoundError:
        raise UserError(f"{workdir} is not the folder of a run: {path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); is {workdir} a run?") from error
    return Run(workdir, config, data, result)


def load_student(workdir: str | pathlib.Path, which: str = "last") -> Classifier:
    """The network that a run trained, ready to classify images: `load_run(...).classifier(...)`."""
    return load_run(workdir).classifier(which)
