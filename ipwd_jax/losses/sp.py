"""Tung and Mori, 2019 (Similarity-preserving distillation): match which samples are alike."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, gather_rows, l2_normalize
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32


def similarity(x: jax.Array) -> jax.Array:
    """Scalar products of all pairs of rows, normalised row by row: (B, D) -> (B, B)."""
    return l2_normalize(jnp.einsum("id,jd->ij", x, x, precision="highest"))


def sp_loss(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean squared difference between the two similarity matrices of the valid rows.

    Agrees with `Similarity` of RepDistiller.

    Args:
        student: (B, ...); each row is flattened.
        teacher: (B, ...); each row is flattened.
        mask: (B,), 0 for padding rows.

    Returns:
        Scalar loss, in float32 or better.
    """
    valid = mask > 0
    s, t = (_rows(x, valid) for x in (student, teacher))
    # Padding rows are set to 0, so they contribute neither to the norms nor to the sum.
    return jnp.square(similarity(s) - similarity(t)).sum() / jnp.square(valid.sum(dtype=s.dtype))


def _rows(x: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[:, None], at_least_float32(x.reshape(len(x), -1)), 0)


class SP(Term):
    """`sp_loss` of the last maps, over the rows of all devices.

    The largest intermediate array is (B, H W C), the last map, or (B, B), where B counts the rows
    of all devices.

    Attributes:
        axis_name: mapped axis over which the rows are distributed.
    """

    axis_name: str | None = None

    paper = "Tung and Mori, 2019: Similarity-preserving distillation"
    teacher_taps = ("features",)
    mixed_images = True
    per_sample = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        rows = gather_rows(self.axis_name, student.features[-1], teacher.features[-1], batch.mask)
        return sp_loss(*rows)
