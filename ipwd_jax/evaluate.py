"""A network's predictions for a whole split, and their metrics."""

import contextlib
import operator
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


def make_predict(
    apply: Callable[[PyTree, jax.Array], Any],
    read: Callable[[Outputs], jax.Array] = operator.attrgetter("logits"),
) -> Callable[..., jax.Array]:
    """Compile `predict(variables, data, index, images) -> logits` for unaugmented images.

    `index` (devices, B) int32 selects images of `data`, unless `images` (devices, B, H, W,
    channels) uint8 are given, both for the devices of this process. The logits (devices, B, C) are
    those of all devices.

    Args:
        apply: `apply(variables, images) -> Outputs`, for example the `apply` of a network, whose
            result Flax declares as `Any`. Products are computed in float32 unless it sets another
            precision itself.
        read: what is returned of the outputs; by default the logits.
    """

    def predict(
        variables: PyTree, data: Resident, index: jax.Array, images: jax.Array | None
    ) -> jax.Array:
        images = data.images_at(index) if images is None else images
        with precision.of_products("float32"):
            outputs: Outputs = apply(variables, augment.normalize(images, data.mean, data.std))
            return read(outputs)

    return parallel.compile_predict(predict)


def predict_all(
    predict: Callable[..., jax.Array],
    variables: PyTree,
    data: Resident,
    split: Split,
    batch_size: int,
) -> np.ndarray:
    """Return the logits (N, C) of all images of a split, for any N and any number of devices.

    If `predict` returns something else, (devices, B, ...), this is returned as (N, ...).

    Args:
        predict: what `make_predict` returns.
        variables: variables of the network, on all devices.
        data: the part of the split that lives on the devices.
        split: the split.
        batch_size: number of images per call, over all devices; it does not change the result.
    """
    size = len(split.labels)
    order = np.arange(size, dtype=np.int32)
    index, mask = augment.epoch_batches(order, min(batch_size, size), parallel.device_count())
    logits = []
    index = index[:, parallel.own()]
    with contextlib.closing(_images(split, index)) as images:
        for rows, valid, given in zip(index, mask, images, strict=True):
            logits.append(np.asarray(predict(variables, data, rows, given))[valid > 0])
    return np.concatenate(logits)


def _images(split: Split, index: np.ndarray) -> Generator[np.ndarray | None]:
    """Yield the images of each call, (devices, B, H, W, channels); None if they are in memory."""
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
    """Return the scores of `metrics.evaluate` and, given `class_mass`, the recall of class groups.

    The recalls are called `recall_group1`, `recall_group2` and so on, from the head to the tail of
    the ranking of the classes by `class_mass`.

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
