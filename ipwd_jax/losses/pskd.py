"""Self-knowledge distillation with progressive refinement of targets (Kim et al., ICCV 2021)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax.losses.base import Batch, Term, cross_entropy, gather_rows
from ipwd_jax.models.base import Outputs


def progress(epoch: jax.Array, epochs: int, last_share: float) -> jax.Array:
    """The share of past predictions in the target, which rises linearly to `last_share`.

    Args:
        epoch: number of epochs finished.
        epochs: number of epochs in the stage.
        last_share: share in the last epoch (alpha_T).
    """
    return last_share * (epoch + 1) / epochs


class PSKD(Term):
    """`(1 - a) CE(label) + a H(P, softmax)`, where P is the student's prediction an epoch ago.

    P is the softmax that the sample got in the training step of the previous epoch, with the view
    and the BatchNorm statistics of that step; in the first epoch it is the one-hot label. The share
    a is that of `progress`. Agrees with https://github.com/lgcnsai/PS-KD-Pytorch. A weighting
    multiplies only the second part. The largest intermediate array is N x C, the table of past
    predictions.

    Attributes:
        last_share: a in the last epoch; 0.8 on CIFAR-100.
        axis_name: mapped axis over which the rows are distributed.
        train_size: N, the number of training samples.
        epochs: number of epochs in the stage.
    """

    last_share: float = 0.8
    axis_name: str | None = None
    train_size: int = 0
    epochs: int = 1

    paper = "Kim et al., 2021: Progressive refinement of targets"

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> jax.Array:
        """`a H(P, softmax)` of each sample, (B,); stores the softmax for the next epoch."""
        classes = student.logits.shape[1]
        table = self.variable(
            "memory", "predictions", jnp.zeros, (self.train_size, classes), jnp.float32
        )
        log_p = jax.nn.log_softmax(student.logits)
        onehot = jax.nn.one_hot(batch.label, classes, dtype=log_p.dtype)
        past = jnp.where(batch.epoch == 0, onehot, table.value[batch.index].astype(log_p.dtype))
        if not self.is_initializing():
            # Padding rows get an index past the end, so that their update is dropped.
            index = jnp.where(batch.mask > 0, batch.index, self.train_size)
            now = lax.stop_gradient(jnp.exp(log_p)).astype(jnp.float32)
            index, now = gather_rows(self.axis_name, index, now)
            table.value = table.value.at[index].set(now, mode="drop")
        share = progress(batch.epoch, self.epochs, self.last_share)
        return -share * jnp.sum(past * log_p, axis=1)

    @nn.nowrap
    def label_loss(self, student: Outputs, batch: Batch) -> jax.Array:
        """`(1 - a) CE(label)` of each sample, (B,)."""
        share = progress(batch.epoch, self.epochs, self.last_share)
        return (1 - share) * cross_entropy(student.logits, batch.label)

    @nn.nowrap
    def class_mass(self, memory: Mapping[str, jax.Array]) -> np.ndarray:
        """The past predictions summed over the training set, (C,)."""
        return np.asarray(memory["predictions"]).sum(axis=0)
