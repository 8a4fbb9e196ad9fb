"""Distances between the classes of a data set, as a trained network sees them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax import evaluate, parallel
from ipwd_jax.data import memory
from ipwd_jax.data.base import Dataset
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.typing import PyTree


def of_classifier(kernel: np.ndarray) -> np.ndarray:
    """Return one minus the cosine of the weights of any two classes.

    Args:
        kernel: (D, C), the kernel of a linear classifier.

    Returns:
        (C, C) distances in 0..2.
    """
    norms = np.linalg.norm(kernel, axis=0)
    unit = kernel / np.maximum(norms, np.finfo(kernel.dtype).tiny)
    return np.clip(1 - unit.T @ unit, 0, 2)


@jax.jit
def of_features(features: jax.Array) -> jax.Array:
    """Return one minus the linear CKA of the features of any two classes.

    With X_a the features of class a, minus their mean, the CKA is
    `|X_b' X_a|_F^2 / (|X_a' X_a|_F |X_b' X_b|_F)` (Kornblith et al. 2019,
    https://arxiv.org/abs/1905.00414). It compares the i-th row of one class with the i-th row of
    the other, so that it depends on the order of the rows.

    Args:
        features: (C, n, D).

    Returns:
        (C, C) distances in 0..1.
    """
    centred = features - features.mean(axis=1, keepdims=True)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.square(jnp.matmul(b.T, a, precision="highest")).sum()

    products = lax.map(lambda a: lax.map(functools.partial(product, a), centred), centred)
    norms = jnp.sqrt(jnp.diagonal(products))
    scale = jnp.maximum(norms[:, None] * norms[None], jnp.finfo(norms.dtype).tiny)
    return jnp.clip(1 - products / scale, 0, 1)


def of_maps(apply: Callable, variables: PyTree, dataset: Dataset, batch_size: int) -> np.ndarray:
    """Return the distances between the classes that a network's last maps give, (C, C) float32.

    These are `of_features` of the last of the network's `features` on the unaugmented training
    images, where the rows of a class are the pixels of its images in the order of the training set.
    Where classes have different numbers of images, each has as many as the smallest one, the first.

    Args:
        apply: `apply(variables, images) -> Outputs`.
        variables: variables of the network, on all devices.
        dataset: the data set.
        batch_size: number of images per call; it does not change the result.

    Raises:
        UserError: a class has no training image, or the maps do not fit into memory.
    """
    train, classes = dataset.train, len(dataset.class_names)
    counts = np.bincount(train.labels, minlength=classes)
    if not counts.min():
        name = dataset.class_names[int(counts.argmin())]
        raise UserError(
            f"a loss term compares the teacher's maps of the classes, but {dataset.name} has no "
            f"training image of the class {name!r}; take distances between the weights of the "
            "teacher's classifier instead"
        )
    by_class = [np.flatnonzero(train.labels == c)[: counts.min()] for c in range(classes)]
    predict = evaluate.make_predict(apply, lambda outputs: outputs.features[-1])

    def maps_of(index: np.ndarray) -> np.ndarray:
        split = train.take(index.astype(np.int32))
        data = parallel.replicate(resident(dataset, split))
        maps = evaluate.predict_all(predict, variables, data, split, batch_size)
        return maps.reshape(-1, maps.shape[-1])

    first = maps_of(by_class[0])
    memory.check(
        "the teacher's maps of all training images",
        3 * classes * first.nbytes,
        "take distances between the weights of the teacher's classifier instead",
    )
    features = np.empty((classes, *first.shape), first.dtype)
    features[0] = first
    for c in range(1, classes):
        features[c] = maps_of(by_class[c])
    return np.asarray(of_features(jnp.asarray(features)))
