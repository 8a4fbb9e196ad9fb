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
# After r rounds a number has stayed where it was with a probability of 2^-r.
_ROUNDS = 32


def draw_negatives(
    key: jax.Array, index: jax.Array, labels: jax.Array, train_labels: jax.Array, count: int
) -> jax.Array:
    """Draw samples of other classes, uniformly and without replacement.

    They are the first `count` of a random permutation of all samples of other classes, of which
    only these are computed: the K largest of N random numbers cost several training steps.
    At least `count` samples must be of other classes; a run checks that before it starts.

    Args:
        key: typed PRNG key of the epoch; the draw is a function of it and of the index alone.
        index: (B,) int32.
        labels: (B,) int32.
        train_labels: (N,) int32.
        count: K.

    Returns:
        (B, K) int32 positions in the training set.
    """
    by_class = jnp.argsort(train_labels)
    ordered = train_labels[by_class]
    first, end = (jnp.searchsorted(ordered, labels, side) for side in ("left", "right"))

    def draw(i: jax.Array, first: jax.Array, own: jax.Array) -> jax.Array:
        others = train_labels.size - own
        x = permute(jax.random.fold_in(key, i), jnp.arange(count, dtype=jnp.int32), others)
        return by_class[jnp.where(x < first, x, x + own)]

    return jax.vmap(draw)(index, first, end - first)


def permute(key: jax.Array, x: jax.Array, size: jax.Array) -> jax.Array:
    """Where a pseudo-random permutation of 0..size-1 takes some numbers, each alone.

    In each round x and `pivot - x` (modulo size) change places or not, as a bit says that is
    hashed from the larger of the two: the swap-or-not shuffle of Hoang, Morris and Rogaway
    (CRYPTO 2012, https://arxiv.org/abs/1208.1176).

    Args:
        key: typed PRNG key, which chooses the permutation.
        x: int32 of any shape, in 0..size-1.
        size: scalar integer, below 2^30.

    Returns:
        int32 like `x`, different for different numbers.
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

    # As one expression of all rounds it does not compile within minutes with jaxlib 0.12.
    return lax.scan(swap, x, (pivots, salts), unroll=4)[0]


def contrast_loss(scores: jax.Array, train_size: int) -> jax.Array:
    """Noise-contrastive loss of each sample, as `ContrastLoss` of RepDistiller.

    Args:
        scores: (B, 1 + K), the positive first, already divided by their normaliser.
        train_size: N; the noise is uniform over the training set.

    Returns:
        (B,).
    """
    noise = (scores.shape[1] - 1) / train_size
    positive = jnp.log(scores[:, 0] / (scores[:, 0] + noise + _EPS))
    negative = jnp.log(noise / (scores[:, 1:] + noise + _EPS))
    return -(positive + negative.sum(axis=1))


class CRD(Term):
    """Contrasts each sample's embedding with the other network's memory of all samples.

    Agrees with `crd/` of RepDistiller (mode "exact"): two linear embeddings of unit length, two
    banks of the training set's embeddings, normalisers that the first batch sets once and for
    all, banks read before they are updated. All scores of a batch with a bank are one matrix
    product, from which the drawn ones are taken: the same dot products as gathering the rows
    first, for a fraction of the memory traffic. Weighting is refused: a bank is shared by all
    samples. Largest intermediate: B x N scores.

    Attributes:
        feat_dim: width of the embeddings and of the banks.
        negatives: K, drawn anew for each sample in each epoch.
        temperature: of the scores.
        momentum: share of a bank's row that a visit keeps.
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
    def check(self, dataset: "Dataset") -> None:
        """Raises `UserError` where a class leaves fewer than `negatives` images of others."""
        labels = dataset.train.labels
        others = len(labels) - int(np.bincount(labels).max())
        if self.negatives > others:
            raise UserError(
                f"config.terms.crd.negatives is {self.negatives}, but {dataset.name} has classes "
                f"with only {others} training images of other classes"
            )

    @nn.compact
    def __call__(
        self,
        student: Outputs,
        teacher: Outputs,
        batch: Batch,
        contrast_index: jax.Array | None = None,
    ) -> jax.Array:
        """The scalar loss; `contrast_index` (B, 1 + K) in place of drawn ones, positive first."""
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
            # At full precision: a division by a small number and an exponential follow.
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

        # Rows that only pad are written past the end, which drops them.
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
