"""Contrastive representation distillation (Tian et al., ICLR 2020)."""

import math
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Batch, Term, gather_rows
from ipwd_jax.models.base import Linear, Outputs

if TYPE_CHECKING:
    from ipwd_jax.data.base import Dataset

_EPS = 1e-7
# After r rounds, a number is still at its original position with a probability of 2^-r.
_ROUNDS = 32


def draw_negatives(
    key: jax.Array, index: jax.Array, labels: jax.Array, train_labels: jax.Array, count: int
) -> jax.Array:
    """Draw samples of other classes, uniformly and without replacement.

    They are the first `count` elements of a random permutation of all samples of other classes.
    Only these elements are computed, because selecting the K largest of N random numbers would take
    as long as several training steps. At least `count` samples must belong to other classes; a run
    checks this before it starts.

    Args:
        key: typed PRNG key of the epoch; the draw depends on it and on the index alone.
        index: (B,) int32.
        labels: (B,) int32.
        train_labels: (N,) int32.
        count: K.

    Returns:
        (B, K) int32, positions in the training set.
    """
    by_class = jnp.argsort(train_labels)
    ordered = train_labels[by_class]
    # On a GPU, many comparisons at once are faster than a few that wait for each other.
    method = "scan" if jax.default_backend() == "cpu" else "compare_all"
    first, end = (
        jnp.searchsorted(ordered, labels, side, method=method) for side in ("left", "right")
    )

    def draw(i: jax.Array, first: jax.Array, own: jax.Array) -> jax.Array:
        others = train_labels.size - own
        x = permute(jax.random.fold_in(key, i), jnp.arange(count, dtype=jnp.int32), others)
        return by_class[jnp.where(x < first, x, x + own)]

    return jax.vmap(draw)(index, first, end - first)


def permute(key: jax.Array, x: jax.Array, size: jax.Array) -> jax.Array:
    """Apply a pseudo-random permutation of 0..size-1 to each element of `x` independently.

    In each round, a bit hashed from the larger of x and `pivot - x` (modulo size) decides whether
    the two change places. This is the swap-or-not shuffle of Hoang, Morris and Rogaway (CRYPTO
    2012, https://arxiv.org/abs/1208.1176).

    Args:
        key: typed PRNG key, which selects the permutation.
        x: int32 of any shape, in 0..size-1.
        size: scalar integer, below 2^30.

    Returns:
        int32 of the shape of `x`; different numbers give different results.
    """
    of_pivots, of_bits = jax.random.split(key)
    pivots = jax.random.randint(of_pivots, (_ROUNDS,), 0, size, jnp.int32)
    salts = jax.random.bits(of_bits, (_ROUNDS,), jnp.uint32)

    def swap(x: jax.Array, round_: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        pivot, salt = round_
        y = pivot - x
        y = jnp.where(y < 0, y + size, y)
        mixed = (jnp.maximum(x, y).astype(jnp.uint32) ^ salt) * jnp.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
        return jnp.where(mixed >> 31 > 0, y, x), None

    # On a CPU, jaxlib 0.12 does not compile a single expression of all rounds within minutes.
    unroll = 4 if jax.default_backend() == "cpu" else _ROUNDS
    return lax.scan(swap, x, (pivots, salts), unroll=unroll)[0]


def contrast_loss(scores: jax.Array, train_size: int) -> jax.Array:
    """Noise-contrastive loss of each sample, as in `ContrastLoss` of RepDistiller.

    Args:
        scores: (B, 1 + K), the positive first, already divided by the normaliser.
        train_size: N, the number of training samples; the noise is uniform over them.

    Returns:
        (B,) loss.
    """
    noise = (scores.shape[1] - 1) / train_size
    positive = jnp.log(scores[:, 0] / (scores[:, 0] + noise + _EPS))
    negative = jnp.log(noise / (scores[:, 1:] + noise + _EPS))
    return -(positive + negative.sum(axis=1))


class CRD(Term):
    """Contrasts each sample's embedding with the other network's memory bank of all samples.

    Agrees with `crd/` of RepDistiller (mode "exact"): there are two linear embeddings of unit
    length and two banks that hold the embeddings of the training set; the first batch sets the
    normalisers, which then stay fixed; and the banks are read before they are updated. The scores
    of a batch against a whole bank are computed as one matrix product, from which the drawn ones
    are taken. The dot products are the same as if the rows were gathered first, but take a fraction
    of the memory traffic. The term cannot be weighted, because all samples share the banks. The
    largest intermediate array is B x N, the scores.

    Attributes:
        feat_dim: width of the embeddings and of the banks.
        negatives: K, the number of negatives, drawn anew for each sample in each epoch.
        temperature: temperature that divides the dot products.
        momentum: fraction of a bank's row that is kept when the row is updated.
        axis_name: mapped axis over which the rows are distributed.
        train_size: N, the number of training samples.
    """

    feat_dim: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    axis_name: str | None = None
    train_size: int = 0

    paper = "Tian et al., 2020: Contrastive representation distillation"
    teacher_taps = ("embedding",)
    per_sample = False

    @nn.nowrap
    def check(self, dataset: "Dataset", teacher: nn.Module | None) -> None:
        """Raises `UserError` if a class leaves fewer than `negatives` images of other classes."""
        labels = dataset.train.labels
        others = len(labels) - int(np.bincount(labels).max())
        if self.negatives > others:
            raise UserError(
                f"config.terms.crd.negatives is {self.negatives}, but {dataset.name} has a class "
                f"with only {others} training images of other classes; set it to at most {others}"
            )

    @nn.compact
    def __call__(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        contrast_index: jax.Array | None = None,
    ) -> jax.Array:
        """The scalar loss; `contrast_index` (B, 1 + K), positive first, replaces drawn samples."""
        v1 = _unit(Linear(self.feat_dim, name="embed_s.linear")(student.embedding))
        v2 = _unit(Linear(self.feat_dim, name="embed_t.linear")(teacher.embedding))
        bound = 1 / math.sqrt(self.feat_dim / 3)
        shape = self.train_size, self.feat_dim

        def bank(fold: int) -> jax.Array:
            key = jax.random.fold_in(self.make_rng("params"), fold)
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        bank1 = self.variable("memory", "memory_v1", bank, 1)
        bank2 = self.variable("memory", "memory_v2", bank, 2)
        constants = self.variable("memory", "Z", lambda: jnp.zeros(2, jnp.float32))
        if self.is_initializing():
            return jnp.zeros(())
        if contrast_index is None:
            negatives = draw_negatives(
                batch.key, batch.index, batch.label, batch.train_labels, self.negatives
            )
            contrast_index = jnp.concatenate([batch.index[:, None], negatives], axis=1)

        def scores(v: jax.Array, bank: jax.Array) -> jax.Array:
            # Full precision, because a division by a small number and an exponential follow.
            products = jnp.matmul(v, bank.astype(v.dtype).T, precision="highest")
            products = products / self.temperature
            return jnp.exp(jnp.take_along_axis(products, contrast_index, axis=1))

        s1, s2 = scores(v1, bank2.value), scores(v2, bank1.value)
        total = jnp.stack([(s.mean(axis=1) * batch.mask).sum() for s in (s1, s2)])
        count = batch.mask.sum()
        if self.axis_name is not None:
            total, count = lax.psum((total, count), self.axis_name)
        first = lax.stop_gradient(total / count * self.train_size).astype(constants.value.dtype)
        constants.value = z = jnp.where(constants.value == 0, first, constants.value)
        loss = contrast_loss(s1 / z[0].astype(v1.dtype), self.train_size)
        loss += contrast_loss(s2 / z[1].astype(v2.dtype), self.train_size)

        # Padding rows get an index past the end, so that their update is dropped.
        index = jnp.where(batch.mask > 0, batch.index, self.train_size)
        index, loss, mask, rows1, rows2 = gather_rows(
            self.axis_name, index, loss, batch.mask, *map(lax.stop_gradient, (v1, v2))
        )
        for memory, rows in ((bank1, rows1), (bank2, rows2)):
            kept = self.momentum * memory.value[index] + (1 - self.momentum) * rows
            new = _unit(kept).astype(memory.value.dtype)
            memory.value = memory.value.at[index].set(new, mode="drop")
        return (loss * mask).sum() / mask.sum()


def _unit(x: jax.Array) -> jax.Array:
    squares = jnp.square(x).sum(axis=1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, jnp.finfo(x.dtype).tiny))
