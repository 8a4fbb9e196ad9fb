"""Wei et al., 2024 (Scale decoupled distillation): compare the logits of regions of the image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from ipwd_jax.losses.base import (
    Batch,
    Term,
    adaptive_avg_pool,
    classifier_of,
    pre_pool_of,
    warmup_factor,
)
from ipwd_jax.losses.dkd import dkd_loss
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Outputs

_GRID = 4  # side of the grid to which a map is pooled before it is divided into regions


def region_logits(
    map_: jax.Array, classifier: tuple[jax.Array, jax.Array], scales: Sequence[int]
) -> jax.Array:
    """The logits that a network's classifier gives to the mean feature of each region.

    A scale k divides the image into k x k regions, which are in the order of the scales and, within
    a scale, row by row.

    Args:
        map_: (B, H, W, D), the map before the network's pooling.
        classifier: kernel (D, C) and bias (C,).
        scales: the numbers k.

    Returns:
        (B, N, C), where N is the sum of the k^2.
    """
    kernel, bias = classifier
    grid = adaptive_avg_pool(map_, _GRID, _GRID)
    regions = [adaptive_avg_pool(grid, k, k).reshape(len(grid), k * k, -1) for k in scales]
    return jnp.concatenate(regions, axis=1) @ kernel + bias[None, None]


def region_weights(teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 for each region where the teacher is right or wrong as it is on the first region, else 2.

    Args:
        teacher_logits: (B, N, C) of regions, of which the first is the whole image.
        labels: (B,).

    Returns:
        (B, N), of the dtype of the logits.
    """
    right = teacher_logits.argmax(axis=2) == labels[:, None]
    return jnp.where(right == right[:, :1], 1, 2).astype(teacher_logits.dtype)


def nkd_with_target_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    gamma: float,
    temperature: float,
) -> jax.Array:
    """NKD as in the authors' code of SDD, where the target remains among the other classes.

    The loss is `-p_t(y) ln p_s(y) + gamma T^2 H(p_t(T), p_s(T))`, with softmaxes over all classes.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,) integers in 0..C-1.
        gamma: weight of the second part.
        temperature: T > 0.

    Returns:
        (B,) loss in nats.
    """
    log_s, log_t = jax.nn.log_softmax(student_logits), jax.nn.log_softmax(teacher_logits)
    target = jax.nn.one_hot(labels, log_s.shape[1], dtype=log_s.dtype)
    of_target = -(target * jnp.exp(log_t) * log_s).sum(axis=1)
    return of_target + gamma * kd_loss(student_logits, teacher_logits, temperature, True)


class SDD(Term):
    """A loss of logits, applied to regions of the image at several scales, per sample.

    `region_logits` gives the logits of each region, with the network's own classifier. The losses
    of a sample's regions are averaged with `region_weights`. The gradient reaches the student's map
    and its classifier. Agrees with the authors' code. The largest intermediate array is (B, N, C),
    the logits of N regions.

    Attributes:
        base: the loss of a region: "kd", "dkd", or "nkd" (see `nkd_with_target_loss`).
        temperature: T.
        alpha: weight of the target part of "dkd".
        beta: weight of the other classes, which is called gamma in "nkd"; not used by "kd".
        scales: the numbers of regions per side, of which the first must be 1; (1, 2) or (1, 2, 4).
        warmup: number of epochs over which the factor of the loss rises to 1, with epochs counted
            from 1; 20 for "dkd" and "nkd", 0 for "kd".
    """

    base: str = "dkd"
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    scales: tuple[int, ...] = (1, 2, 4)
    warmup: int = 20

    paper = "Wei et al., 2024: Scale decoupled distillation"
    teacher_taps = ("pre_pool", "classifier")
    choices = {"base": ("kd", "dkd", "nkd")}  # noqa: RUF012
    not_negative = ("alpha", "beta")

    @nn.nowrap
    def unread(self) -> dict[str, str]:
        """The weights that the loss of a region does not have."""
        used = {"kd": (), "dkd": ("alpha", "beta"), "nkd": ("beta",)}[self.base]
        return {name: "base" for name in ("alpha", "beta") if name not in used}

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss, (B,). Raises `ValueError` for scales without 1, or if a tap is missing."""
        if self.scales[:1] != (1,):
            raise ValueError(
                f"config.terms.sdd.scales must begin with 1, the whole image, found {self.scales}"
            )
        s, t = (
            region_logits(pre_pool_of(x), classifier_of(x), self.scales) for x in (student, teacher)
        )
        rows, regions, classes = t.shape
        labels = jnp.repeat(batch.label, regions)
        flat = self._base_loss(s.reshape(-1, classes), t.reshape(-1, classes), labels)
        loss = (region_weights(t, batch.label) * flat.reshape(rows, regions)).mean(axis=1)
        return warmup_factor(batch, self.warmup).astype(loss.dtype) * loss

    def _base_loss(self, s: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        if self.base == "kd":
            return kd_loss(s, t, self.temperature)
        if self.base == "dkd":
            return dkd_loss(s, t, labels, self.alpha, self.beta, self.temperature)
        return nkd_with_target_loss(s, t, labels, self.beta, self.temperature)
