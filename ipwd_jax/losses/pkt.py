"""Passalis and Tefas, 2018 (Probabilistic knowledge transfer): match neighbourhoods of samples."""

import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, gather_rows, safe_norm
from ipwd_jax.models.base import Outputs
from ipwd_jax.precision import at_least_float32

_EPS = 1e-7


def neighbours(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Each row's distribution over valid rows, by cosine: (B, D) and mask (B,) -> (B, B)."""
    valid = mask > 0
    x = jnp.where(valid[:, None], at_least_float32(x), 0)
    unit = x / (safe_norm(x, keepdims=True) + _EPS)
    cosine = jnp.einsum("id,jd->ij", unit, unit, precision="highest")
    # Rounding must not make the kernel negative, because its logarithm is taken later.
    kernel = jnp.where(valid[None], jnp.maximum((cosine + 1) / 2, 0), 0)
    return kernel / kernel.sum(axis=1, keepdims=True)


def pkt_loss(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """KL divergence of the student's `neighbours` from the teacher's, divided by the squared count.

    This is a mean over all pairs of valid rows, as in `PKT` of RepDistiller, with which it agrees.

    Args:
        student: (B, D).
        teacher: (B, D').
        mask: (B,), 0 for padding rows; at least one row must be valid.

    Returns:
        Scalar loss, in float32 or better.
    """
    s, t = (neighbours(x, mask) for x in (student, teacher))
    valid = mask > 0
    divergence = (t * jnp.log((t + _EPS) / (s + _EPS))).sum(axis=1)
    return jnp.where(valid, divergence, 0).sum() / jnp.square(valid.sum(dtype=s.dtype))


class PKT(Term):
    """`pkt_loss` of the embeddings, over the rows of all devices.

    The largest intermediate array is (B, D), the embeddings, or (B, B), where B counts the rows of
    all devices.

    Attributes:
        axis_name: mapped axis over which the rows are distributed.
    """

    axis_name: str | None = None

    paper = "Passalis and Tefas, 2018: Probabilistic knowledge transfer"
    teacher_taps = ("embedding",)
    mixed_images = True
    per_sample = False

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        rows = gather_rows(self.axis_name, student.embedding, teacher.embedding, batch.mask)
        return pkt_loss(*rows)
