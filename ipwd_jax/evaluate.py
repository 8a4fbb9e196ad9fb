"""A network's answers to a whole split, and what they are worth."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ipwd_jax import metrics, parallel
from ipwd_jax.data import augment
from ipwd_jax.data.resident import Resident


def make_predict(network: nn.Module) -> Callable:
    """Compiles `predict(variables, data, index) -> logits`, in inference mode, unaugmented.

    `index` (devices, B) int32 selects rows of `data`; the result is (devices, B, C).
    """

    def predict(variables: Any, data: Resident, index: jax.Array) -> jax.Array:
        image = augment.normalize(data.images[index], data.mean, data.std)
        return network.apply(variables, image).logits

    return parallel.compile_predict(predict)


def predict_all(predict: Callable, variables: Any, data: Resident, batch_size: int) -> np.ndarray:
    """Logits (N, C) of every image of a split, whatever N and the number of devices.

    Args:
        predict: of `make_predict`.
        variables: of the network, on all devices.
        data: the split, on all devices.
        batch_size: images of a call over all devices; does not change the result.
    """
    size = len(data.labels)
    order = np.arange(size, dtype=np.int32)
    index, mask = augment.epoch_batches(order, min(batch_size, size), parallel.device_count())
    logits = [predict(variables, data, rows) for rows in index]
    return np.concatenate(
        [np.asarray(rows)[valid > 0] for rows, valid in zip(logits, mask, strict=True)]
    )


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
