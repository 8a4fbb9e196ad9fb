"""Per-sample weights of distillation terms: uniform, constant, WSLD and IPWD.

A weighting is a function of the two networks' logits and the labels; it multiplies the per-sample
loss of the terms named in `config.weighting.terms`. Weights never carry a gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs

_LARGEST_RATIO = 1e26  # leaves room in float32 for its product with a loss and a sum over samples


def surprise(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each sample with its label, with a small relative error also near 0.

    `log(1 + sum of exp(z_j - z_label) over the others)`. A log-softmax, which the losses take,
    has an absolute error instead: in float32 it is 0 from about 1e-7 downwards. A loss does not
    see that, but a ratio of two such numbers does.

    Args:
        logits: (B, C), C >= 2.
        labels: (B,) integers in 0..C-1.

    Returns:
        (B,) in nats, of the dtype of `logits`; 0 only where that has no number so small.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    is_own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return jax.nn.softplus(jax.nn.logsumexp(logits - own, axis=1, where=~is_own))


def wsld_weights(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array):
    """`1 - exp(-CE(student) / CE(teacher))` of each sample, at temperature 1.

    Zhou et al., 2021 (Rethinking soft labels: a bias-variance trade-off perspective); agrees with
    the authors' code. Used with `kd.cross_entropy`, T 4 and loss weight 2.25 on CIFAR-100.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,) integers.

    Returns:
        (B,) weights in [0, 1], detached.
    """
    ratio = surprise(student_logits, labels) / (surprise(teacher_logits, labels) + 1e-7)
    return lax.stop_gradient(-jnp.expm1(-jnp.maximum(ratio, 0.0)))


def standardized(logits: jax.Array) -> jax.Array:
    """z-score of each sample over its classes, with the biased deviation: (B, C) -> (B, C)."""
    mean = logits.mean(axis=1, keepdims=True)
    return (logits - mean) / (logits.std(axis=1, keepdims=True) + 1e-6)


def ipwd_scores(
    kd_logits: jax.Array, cls_logits: jax.Array, labels: jax.Array, standardize: bool = True
) -> tuple[jax.Array, jax.Array]:
    """How badly each of the two heads explains the label: `(H_kd, H_cls)`.

    Niu et al., 2022, as far as the paper tells: the cross-entropy of the logits, standardised so
    that the two heads' scales do not matter.

    Args:
        kd_logits: (B, C) of the head that is trained with the teacher.
        cls_logits: (B, C) of the head that is trained with labels only.
        labels: (B,) integers.
        standardize: whether `standardized` is applied first.

    Returns:
        Two (B,) arrays in nats, detached.
    """
    if standardize:
        kd_logits, cls_logits = standardized(kd_logits), standardized(cls_logits)
    return lax.stop_gradient((surprise(kd_logits, labels), surprise(cls_logits, labels)))


def ipwd_weights(h_kd, h_cls, ratio: str = "A"):
    """Inverse propensity of each sample from its two scores, never below 1.

    A: `1 + H_kd / H_cls`, the propensity being `H_cls / (H_cls + H_kd)`: samples that the
    distilled head explains badly are under-represented in the teacher's answers. B turns the
    ratio round. The paper leaves the direction open; an inverse propensity must be negatively
    correlated with the teacher's mass, which every IPWD run reports for both.

    Nothing limits a weight but the float type: a score below its smallest normal number, 1e-38 in
    float32, counts as that number, so that two heads that are both certain weigh 2, and the ratio
    ends at 1e26. With 1,000 classes a label-only head that is certain where the distilled one is
    wrong makes weights of up to 1e12; `weighting.clip` limits them.

    Args:
        h_kd: (B,) score of the distilled head, NumPy or JAX.
        h_cls: (B,) score of the label-only head.
        ratio: "A" or "B".

    Returns:
        (B,) weights.
    """
    h_kd, h_cls = (h.clip(float(jnp.finfo(h.dtype).tiny)) for h in (h_kd, h_cls))
    above, below = {"A": (h_kd, h_cls), "B": (h_cls, h_kd)}[ratio]
    return 1 + above / below.clip(above / _LARGEST_RATIO)


def teacher_taps(weighting: ConfigDict) -> frozenset[str]:
    """Fields of the teacher's `Outputs` that a weighting reads."""
    return frozenset({"logits"} if weighting.name == "wsld" else ())


def init_memory(weighting: ConfigDict, size: int) -> dict[str, jax.Array]:
    """What a weighting remembers of every training sample, each (size,) float32.

    `weight` is the weight of the sample's latest visit, `average` the running mean where
    `weighting.average` asks for one, `h_kd` and `h_cls` the scores of IPWD. Zero before the first
    visit.
    """
    if weighting.name == "uniform":
        return {}
    names = ["weight"]
    names += ["average"] if weighting.average else []
    names += ["h_kd", "h_cls"] if weighting.name == "ipwd" else []
    return {name: jnp.zeros(size, jnp.float32) for name in names}


def weigh(
    weighting: ConfigDict,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    memory: dict[str, jax.Array],
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weights of one batch, and the memory after it.

    Running mean, clip, division by the batch mean and `start_epoch` follow each other in this
    order.

    Args:
        weighting: `config.weighting`.
        student: logits (B, C), and for IPWD `extra_logits["cls"]` and perhaps `["kd"]`.
        teacher: logits (B, C), for WSLD.
        batch: labels, indices, mask and epoch.
        memory: of `init_memory`.
        axis_name: mapped axis over which the global batch is spread.

    Returns:
        (B,) float32 weights without gradient, and the new memory, equal on all devices.
    """
    record = {}
    if weighting.name == "uniform":
        return jnp.ones_like(batch.mask), memory
    if weighting.name == "constant":
        weights = jnp.full_like(batch.mask, weighting.constant)
    elif weighting.name == "wsld":
        weights = wsld_weights(student.logits, teacher.logits, batch.label)
    else:
        kd_logits = student.extra_logits["kd"] if weighting.kd_source == "head" else student.logits
        record["h_kd"], record["h_cls"] = ipwd_scores(
            kd_logits, student.extra_logits["cls"], batch.label, weighting.standardize
        )
        weights = ipwd_weights(record["h_kd"], record["h_cls"], weighting.ratio)
    if weighting.average:
        previous = memory["average"][batch.index]
        decay = jnp.where(previous == 0, 0.0, weighting.average)
        weights = record["average"] = decay * previous + (1 - decay) * weights
    if weighting.clip:
        weights = jnp.minimum(weights, weighting.clip)
    if weighting.batch_normalize:
        total, count = (batch.mask * weights).sum(), batch.mask.sum()
        if axis_name:
            total, count = lax.psum((total, count), axis_name)
        weights = weights * count / total
    if weighting.start_epoch:
        weights = jnp.where(batch.epoch < weighting.start_epoch, 1.0, weights)
    record["weight"] = weights

    # Rows that only pad the batch are written past the end, which drops them.
    index = jnp.where(batch.mask > 0, batch.index, len(memory["weight"]))
    if axis_name:
        index, record = lax.all_gather((index, record), axis_name, tiled=True)
    memory = {name: memory[name].at[index].set(record[name], mode="drop") for name in memory}
    return weights, memory
