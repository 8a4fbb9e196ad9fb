"""Park et al., 2019 (Relational knowledge distillation): match distances and angles of samples."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ipwd_jax.losses.base import Batch, Term, gather_rows, l2_normalize
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32

_MIN_SQUARE = 1e-12


def rkd_losses(
    student: jax.Array, teacher: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much the distances of all pairs of samples, and the angles of all triples, differ.

    Distances are divided by their mean. Both losses are mean smooth L1 losses over the valid rows.
    Agrees with `RKDLoss` of RepDistiller, but computes distances from differences, whereas
    RepDistiller expands the square, which suffers from cancellation when samples are close. A
    distance of 0 contributes no gradient. The largest intermediate array is (B, B, D), the
    differences, or (B, B, B), the cosines.

    Args:
        student: (B, D).
        teacher: (B, D'); no gradient flows to it.
        mask: (B,), 0 for padding rows.

    Returns:
        Scalar losses of the distances and of the angles, in float32 or better.
    """
    valid = mask > 0
    pairs = valid[:, None] & valid[None]
    gaps = [_differences(x, valid) for x in (student, lax.stop_gradient(teacher))]
    count = valid.sum(dtype=gaps[0].dtype)
    s, t = (_distances(gap, pairs) for gap in gaps)
    distance = optax.huber_loss(s - t).sum() / count**2
    s, t = (_cosines(gap, pairs) for gap in gaps)
    angle = optax.huber_loss(s - t).sum() / count**3
    return distance, angle


def _differences(x: jax.Array, valid: jax.Array) -> jax.Array:
    """The differences from each row to each other row: (B, D) -> (B, B, D)."""
    x = jnp.where(valid[:, None], at_least_float32(x), 0)
    return x[None] - x[:, None]


def _distances(gap: jax.Array, pairs: jax.Array) -> jax.Array:
    """Lengths divided by their mean, 0 on the diagonal and outside `pairs`: -> (B, B)."""
    others = pairs & ~jnp.eye(len(gap), dtype=bool)
    lengths = jnp.sqrt(jnp.maximum(jnp.square(gap).sum(axis=2), _MIN_SQUARE))
    lengths = jnp.where(others, lengths, 0)
    # As in the reference, the mean is over the positive lengths: all pairs of different samples.
    mean = lengths.sum() / jnp.maximum(others.sum(), 1)
    return lengths / jnp.where(mean > 0, mean, 1)


def _cosines(gap: jax.Array, pairs: jax.Array) -> jax.Array:
    """Cosines of the angles at i between j and k, 0 outside `pairs`: (B, B, D) -> (B, B, B)."""
    unit = jnp.where(pairs[:, :, None], l2_normalize(gap), 0)
    return jnp.einsum("ijd,ikd->ijk", unit, unit, precision="highest")


class RKD(Term):
    """The weighted sum of the two `rkd_losses` of the embeddings, over the rows of all devices.

    The largest intermediate array is (B, B, D), the differences, or (B, B, B), the cosines, where B
    counts the rows of all devices.

    Attributes:
        distance_weight: weight of the loss of the distances.
        angle_weight: weight of the loss of the angles.
        axis_name: mapped axis over which the rows are distributed.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0
    axis_name: str | None = None

    paper = "Park et al., 2019: Relational knowledge distillation"
    teacher_taps = ("embedding",)
    mixed_images = True
    per_sample = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        rows = gather_rows(self.axis_name, student.embedding, teacher.embedding, batch.mask)
        distance, angle = rkd_losses(*rows)
        return self.distance_weight * distance + self.angle_weight * angle
