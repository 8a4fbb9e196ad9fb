"""A network's predictions for a whole split, and their metrics."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from ipwd_jax import metrics, parallel, precision
from ipwd_jax.data import augment
from ipwd_jax.data.base import Split
from ipwd_jax.data.resident import Resident
from ipwd_jax.models.base import Outputs
from ipwd_jax.typing import PyTree


def make_predict(apply: Callable[[PyTree, jax.Array], Any]) -> Callable[..., jax.Array]:
    """Compiles `predict(variables, data, index, images) -> logits`, unaugmented, for inference.

    `index` (devices, B) int32 selects rows of `data`, unless `images` (devices, B, H, W, channels)
    uint8 are given; the result is (devices, B, C).

    Args:
        apply: `apply(variables, images) -> Outputs`, as a network's (in Flax's declaration its
            result may be anything); float32 unless it says otherwise.
    """

    def predict(
        variables: PyTree, data: Resident, index: jax.Array, images: jax.Array | None
    ) -> jax.Array:
        images = data.images_at(index) if images is None else images
        with precision.of_products("float32"):
            outputs: Outputs = apply(variables, augment.normalize(images, data.mean, data.std))
            return outputs.logits

    return parallel.compile_predict(predict)


def predict_all(
    predict: Callable[..., jax.Array],
    variables: PyTree,
    data: Resident,
    split: Split,
    batch_size: int,
) -> np.ndarray:
    """Logits (N, C) of every image of a split, whatever N and the number of devices.

    Args:
        predict: of `make_predict`.
        variables: of the network, on all devices.
        data: the part of the split that lives on all devices.
        split: the split.
        batch_size: images of a call over all devices; it does not change the result.
    """
    size = len(split.labels)
    order = np.arange(size, dtype=np.int32)
    index, mask = augment.epoch_batches(order, min(batch_size, size), parallel.device_count())
    logits = []
    with contextlib.closing(_images(split, index)) as images:
        for rows, valid, given in zip(index, mask, images, strict=True):
            logits.append(np.asarray(predict(variables, data, rows, given))[valid > 0])
    return np.concatenate(logits)


def _images(split: Split, index: np.ndarray) -> Generator[np.ndarray | None]:
    """Yields the images of each step (devices, B, H, W, channels), or None if they are resident."""
    if isinstance(split.images, np.ndarray):
        yield from [None] * len(index)
        return
    with contextlib.closing(
        split.images.batches(index.reshape(len(index), -1), 0, 0, train=False)
    ) as batches:
        for batch in batches:
            yield batch.reshape(*index.shape[1:], *batch.shape[1:])


def score(
    logits: np.ndarray, labels: np.ndarray, class_mass: np.ndarray | None = None
) -> dict[str, float]:
    """`metrics.evaluate`, with `recall_group1`... (head to tail) if a teacher ranks the classes.

    Args:
        logits: (N, C).
        labels: (N,).
        class_mass: (C,) the teacher's probabilities summed over the training set.
    """
    scores = metrics.evaluate(logits, labels)
    if class_mass is not None:
        groups = metrics.group_recall(logits, labels, class_mass)
        scores |= {f"recall_group{i}": recall for i, recall in enumerate(groups, start=1)}
    return scores
