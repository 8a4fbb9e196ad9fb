"""Peng et al., 2019 (Correlation congruence), as RepDistiller implements it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ipwd_jax.losses.base import Batch, Term, gather_rows
from ipwd_jax.models.base import Linear, Outputs
from ipwd_jax.precision import at_least_float32


def cc_loss(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean product of the absolute differences of consecutive samples, summed over the features.

    The differences are those between student and teacher. Agrees with `Correlation` of
    RepDistiller, which has little in common with the kernels of the paper. With fewer than two
    valid rows the loss is 0.

    Args:
        student: (B, D).
        teacher: (B, D).
        mask: (B,), 0 for padding rows, which must come last.

    Returns:
        Scalar loss.
    """
    valid = (mask > 0).astype(student.dtype)
    gap = jnp.abs(student - teacher) * valid[:, None]
    return (gap[:-1] * gap[1:]).sum() / jnp.maximum(valid.sum() - 1, 1)


class CC(Term):
    """`cc_loss` of linear projections of the embeddings, over the rows of all devices.

    Both projections are trained. The largest intermediate array is (B, feat_dim), where B counts
    the rows of all devices.

    Attributes:
        feat_dim: width of the projections.
        axis_name: mapped axis over which the rows are distributed.
    """

    feat_dim: int = 128
    axis_name: str | None = None

    paper = "Peng et al., 2019: Correlation congruence"
    teacher_taps = ("embedding",)
    mixed_images = True
    per_sample = False

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        valid = batch.mask[:, None] > 0

        def embed(x: jax.Array, name: str) -> jax.Array:
            x = at_least_float32(x)
            return Linear(self.feat_dim, name=name)(jnp.where(valid, x, 0))

        s = embed(student.embedding, "embed_s.linear")
        t = embed(teacher.embedding, "embed_t.linear")
        return cc_loss(*gather_rows(self.axis_name, s, t, batch.mask))
