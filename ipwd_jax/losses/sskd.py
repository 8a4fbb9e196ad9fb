"""Knowledge distillation meets self-supervision (Xu et al., ECCV 2020)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ipwd_jax.losses.base import Batch, Term, gather_rows, l2_normalize
from ipwd_jax.losses.kd import kd_loss
from ipwd_jax.models.base import Linear, Outputs, relu


def similarity(embedding: jax.Array) -> jax.Array:
    """Cosine similarity of every rotated image with every upright one.

    Args:
        embedding: (4 B, D); four consecutive rows belong to one image: upright, then rotated by 90,
            180 and 270 degrees.

    Returns:
        (3 B, B); three consecutive rows belong to one image.
    """
    unit = l2_normalize(embedding, eps=1e-8).reshape(-1, 4, embedding.shape[1])
    rotated = unit[:, 1:].reshape(-1, embedding.shape[1])
    return jnp.matmul(rotated, unit[:, 0].T, precision="highest")


def best_ranked(scores: jax.Array, target: jax.Array, valid: jax.Array, share: float) -> jax.Array:
    """Select the rows to learn from: those that are right, and the least wrong of the others.

    A row is right if `target` has the largest score. Of the `count` wrong rows, the
    `floor(share * count)` rows with the best rank of the target are kept; ties are broken by
    position.

    Args:
        scores: (R, C).
        target: (R,) integers in 0..C-1.
        valid: (R,), 0 for padding rows, which are never kept.
        share: fraction of the wrong rows that is kept, in 0..1.

    Returns:
        (R,) bool, True for the rows that are kept.
    """
    right_score = jnp.take_along_axis(scores, target[:, None], axis=1)
    before = jnp.arange(scores.shape[1])[None] < target[:, None]
    rank = ((scores > right_score) | ((scores == right_score) & before)).sum(axis=1)
    wrong = (rank > 0) & (valid > 0)
    # A product just below an integer, such as 0.7 * 10, counts as that integer.
    keep = jnp.floor(share * wrong.sum() + 1e-4)
    order = jnp.argsort(jnp.where(wrong, rank, scores.shape[1]), stable=True)
    position = jnp.argsort(order)
    return (valid > 0) & ((rank == 0) | (wrong & (position < keep)))


class SSKD(Term):
    """Matches the teacher's predictions for rotated images and their similarity to upright ones.

    The loss is `transform_weight` times the distillation loss of the rotated images plus
    `similarity_weight` times the distillation loss of the rows of `similarity`. Both are means over
    the rows that `best_ranked` selects by the teacher's scores. Cross-entropy and distillation of
    the upright images are the separate terms `ce` and `kd`. The first stage trains only the
    teacher's projection, to identify the upright image from which a rotated one was made. Agrees
    with https://github.com/xuguodong03/SSKD. The largest intermediate array is 3 B x B, the
    similarities.

    Attributes:
        transform_temperature: temperature of the rotated images' logits.
        transform_weight: weight of the loss of the rotated images.
        transform_share: fraction of the wrong rows of the rotated images that is kept.
        similarity_temperature: temperature of the similarities.
        similarity_weight: weight of the loss of the similarities.
        similarity_share: fraction of the wrong rows of the similarities that is kept.
        axis_name: mapped axis over which the rows are distributed.
    """

    transform_temperature: float = 4.0
    transform_weight: float = 2.7
    transform_share: float = 1.0
    similarity_temperature: float = 0.5
    similarity_weight: float = 10.0
    similarity_share: float = 0.75
    axis_name: str | None = None

    paper = "Xu et al., 2020: Knowledge distillation meets self-supervision"
    teacher_taps = ("logits", "embedding")
    per_sample = False
    rotations = True
    first_stage_params = ("teacher_head",)

    def setup(self) -> None:
        self.student_head = Projection()
        self.teacher_head = Projection()

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        projected = self.student_head(student.embedding), self.teacher_head(teacher.embedding)
        rows = *projected, student.logits, teacher.logits, batch.label, batch.mask
        s_rep, t_rep, s_logits, t_logits, label, mask = gather_rows(self.axis_name, *rows)
        return self.transform_weight * self.transform_loss(s_logits, t_logits, label, mask) + (
            self.similarity_weight * self.similarity_loss(s_rep, t_rep, mask)
        )

    def pretrain(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        """The loss of the first stage: cross-entropy of the similarity rows with the true image."""
        projected = self.teacher_head(lax.stop_gradient(teacher.embedding))
        rep, mask = gather_rows(self.axis_name, projected, batch.mask)
        log_p = jax.nn.log_softmax(_valid_columns(similarity(rep), mask))
        target, valid = jnp.repeat(jnp.arange(len(mask)), 3), jnp.repeat(mask, 3)
        right = jnp.take_along_axis(log_p, target[:, None], axis=1)[:, 0]
        return -(right * valid).sum() / valid.sum()

    def transform_loss(
        self,
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        label: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """KD of the rotated images: logits (4 B, C) twice, labels and mask (B,) -> scalar."""

        def rotated(x: jax.Array) -> jax.Array:
            return x.reshape(-1, 4, x.shape[1])[:, 1:].reshape(-1, x.shape[1])

        student_logits, teacher_logits = rotated(student_logits), rotated(teacher_logits)
        target, valid = jnp.repeat(label, 3), jnp.repeat(mask, 3)
        kept = best_ranked(teacher_logits, target, valid, self.transform_share)
        loss = kd_loss(student_logits, teacher_logits, self.transform_temperature)
        return _mean(loss, kept)

    def similarity_loss(
        self, student_rep: jax.Array, teacher_rep: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """KD of the similarity rows: projections (4 B, D) twice, mask (B,) -> scalar."""
        rows = [_valid_columns(similarity(rep), mask) for rep in (student_rep, teacher_rep)]
        student_rows, teacher_rows = rows[0], lax.stop_gradient(rows[1])
        target, valid = jnp.repeat(jnp.arange(len(mask)), 3), jnp.repeat(mask, 3)
        kept = best_ranked(teacher_rows, target, valid, self.similarity_share)
        return _mean(kd_loss(student_rows, teacher_rows, self.similarity_temperature), kept)


class Projection(nn.Module):
    """Two linear layers of the width of the embedding, with a ReLU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(R, D) -> (R, D)."""
        width = x.shape[1]
        return Linear(width, name="2")(relu(Linear(width, name="0")(x)))


def _valid_columns(similarities: jax.Array, mask: jax.Array) -> jax.Array:
    """The similarities, with those to padding rows so low that every softmax ignores them."""
    return jnp.where(mask[None] > 0, similarities, jnp.asarray(-1e4, similarities.dtype))


def _mean(loss: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.where(kept, loss, 0).sum() / jnp.maximum(kept.sum(), 1)
