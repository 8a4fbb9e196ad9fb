"""A network's answers to a whole split, and what they are worth."""

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


def make_predict(apply: Callable[[Any, jax.Array], Outputs]) -> Callable:
    """Compiles `predict(variables, data, index, images) -> logits`, unaugmented, for inference.

    `index` (devices, B) int32 selects rows of `data`, unless `images` (devices, B, H, W, channels)
    uint8 are given; the result is (devices, B, C).

    Args:
        apply: `apply(variables, images)`, as a network's; float32 unless it says otherwise.
    """

    def predict(
        variables: Any, data: Resident, index: jax.Array, images: jax.Array | None
    ) -> jax.Array:
        images = data.images[index] if images is None else images
        with precision.of_products("float32"):
            return apply(variables, augment.normalize(images, data.mean, data.std)).logits

    return parallel.compile_predict(predict)


def predict_all(
    predict: Callable, variables: Any, data: Resident, split: Split, batch_size: int
) -> np.ndarray:
    """Logits (N, C) of every image of a split, whatever N and the number of devices.

    Args:
        predict: of `make_predict`.
        variables: of the network, on all devices.
        data: what of the split is on all devices.
        split: the split.
        batch_size: images of a call over all devices; does not change the result.
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
    """The images of each step (devices, B, H, W, channels) where they are streamed, else None."""
    if not split.streamed:
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
    """`metrics.evaluate`, and `recall_group1`.. (head to tail) where a teacher ranks the classes.

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
