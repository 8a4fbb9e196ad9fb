"""Guo et al., 2023 (Class attention transfer): compare the class activation maps."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import (
    Batch,
    Term,
    adaptive_avg_pool,
    classifier_of,
    l2_normalize,
    pre_pool_of,
)
from ipwd_jax.models.base import Outputs


def class_activation_maps(map_: jax.Array, kernel: jax.Array, resolution: int) -> jax.Array:
    """What each pixel contributes to each logit, averaged over a grid of cells, without the bias.

    Pooling is linear, so the map is pooled before it is multiplied by the kernel.

    Args:
        map_: (B, H, W, D), the map before the network's pooling.
        kernel: (D, C), the kernel of its classifier.
        resolution: r.

    Returns:
        (B, r^2, C).
    """
    cells = adaptive_avg_pool(map_, resolution, resolution)
    return cells.reshape(len(cells), -1, cells.shape[-1]) @ kernel


def cat_kd_loss(student: jax.Array, teacher: jax.Array, normalize: bool = False) -> jax.Array:
    """Mean squared difference of the class activation maps of each sample.

    Agrees with `CAT_loss` of the authors' code, which also takes the mean over the samples.

    Args:
        student: (B, r^2, C).
        teacher: (B, r^2, C).
        normalize: whether each class's map of r^2 cells is first divided by its Euclidean norm.

    Returns:
        (B,) loss.
    """
    if normalize:
        student, teacher = l2_normalize(student, axis=1), l2_normalize(teacher, axis=1)
    return jnp.square(student - teacher).mean(axis=(1, 2))


class CATKD(Term):
    """`cat_kd_loss` of the maps before the pooling, each with its own classifier, per sample.

    The gradient reaches the student's map and the kernel of its classifier. In the authors' runs,
    the student has no classifier bias, so that its class activation maps determine its logits; see
    `config.model.classifier_bias`. The largest intermediate array is (B, r^2, C).

    Attributes:
        resolution: r, the side of the grid to which the maps are pooled; 2 or 4 on CIFAR-100.
        normalize: whether each class's map is divided by its Euclidean norm, as the authors do if
            the architectures of student and teacher differ.
    """

    resolution: int = 2
    normalize: bool = False

    paper = "Guo et al., 2023: Class attention transfer"
    teacher_taps = ("pre_pool", "classifier")
    mixed_images = True

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` if a network lacks a tap that is read."""
        s, t = (
            class_activation_maps(pre_pool_of(x), classifier_of(x)[0], self.resolution)
            for x in (student, teacher)
        )
        return cat_kd_loss(s, t, self.normalize)
