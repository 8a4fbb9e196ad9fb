"""The training images with the largest and the smallest weights."""

import base64
import io

import numpy as np
from PIL import Image

from ipwd_jax import data
from ipwd_jax.errors import UserError
from ipwd_jax.report.content import Gallery, Picture, one_line
from ipwd_jax.report.load import Loaded

_SHOWN = 12  # images of each kind
_LARGEST = 96  # pixels a side


def extremes(loaded: Loaded, weights: np.ndarray, labels: np.ndarray) -> list[Gallery]:
    """The images with the largest and with the smallest weights.

    Args:
        loaded: the run.
        weights: (N,) of its training samples.
        labels: (N,) of its training samples.

    Raises:
        UserError: the run's data is not here, is not in memory, or has changed.
    """
    images, names = _training_images(loaded, labels)
    order = np.argsort(weights, kind="stable")
    kinds = {
        "Largest weights": order[::-1][:_SHOWN],
        "Smallest weights": order[: min(_SHOWN, max(0, len(order) - _SHOWN))],
    }
    return [
        Gallery(kind, [_picture(images[i], int(i), names[labels[i]], weights[i]) for i in chosen])
        for kind, chosen in kinds.items()
        if len(chosen)
    ]


def _training_images(loaded: Loaded, labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The images (N, H, W, channels) and the names of the classes."""
    settings = loaded.run.config.data.copy_and_resolve_references()
    settings.download = False
    if settings.streaming:
        raise UserError("the images are streamed, not in memory, so none are shown")
    try:
        dataset = data.load(settings)
    except UserError as error:
        raise UserError(f"the data of the run is not here: {one_line(error, 300)}") from error
    noted = loaded.checksums.get("data")
    if noted and noted != data.fingerprint(dataset):
        raise UserError(
            f"the data {one_line(settings.name)} has changed since the run, or was given to it as "
            "arrays; its weights belong to other images"
        )
    if not np.array_equal(dataset.train.labels, labels):
        raise UserError(f"the labels of {one_line(settings.name)} are not those of the run")
    images = dataset.train.in_memory
    if images.shape[-1] not in (1, 3, 4):
        raise UserError(f"images of {images.shape[-1]} channels cannot be shown")
    return images, [one_line(name, 24) for name in dataset.class_names]


def _picture(pixels: np.ndarray, index: int, name: str, weight: float) -> Picture:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(
        base64.b64encode(file.getvalue()).decode(),
        f"training image {index}, class {name}, weight {weight:.3g}",
        f"{name}: {weight:.3g}",
    )
