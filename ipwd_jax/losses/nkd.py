"""Yang et al., 2023 (NKD and USKD): normalised distillation, from a teacher and from oneself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ipwd_jax.losses.base import Batch, Term, cross_entropy, gather_rows
from ipwd_jax.losses.dkd import split_classes
from ipwd_jax.models.base import Linear, Outputs

_EPS = 1e-6
# Label smoothing of the weak head's loss.
_SMOOTHING = 0.1


def nkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> jax.Array:
    """The soft loss of the target and the normalised loss of the other classes, of each sample.

    `-p_t(y) ln p_s(y) - gamma T^2 sum_c q_t(c) ln q_s(c)`, where p is the softmax, y the label, and
    q the softmax at temperature T over the classes c other than y. Both parts are cross-entropies,
    so the loss of equal answers is not 0. Agrees with `NKDLoss` of the authors' code.

    Args:
        student_logits: (B, C), C >= 2.
        teacher_logits: (B, C).
        labels: (B,) integers in 0..C-1.
        gamma: weight of the second part.
        temperature: T > 0.

    Returns:
        (B,) loss in nats, in float32 or better.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[1], dtype=bool)

    def parts(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        binary, _ = split_classes(logits, target)
        _, others = split_classes(logits, target, temperature)
        return binary[:, 0], others

    (own_s, others_s), (own_t, others_t) = parts(student_logits), parts(teacher_logits)
    of_others = jnp.sum(jnp.exp(others_t) * others_s, axis=1)  # the target contributes 1 * 0
    return -jnp.exp(own_t) * own_s - gamma * temperature**2 * of_others


class NKD(Term):
    """`nkd_loss` of the two networks' logits, per sample.

    The largest intermediate array is (B, C), the logits.

    Attributes:
        gamma: weight of the other classes; 3.5 on CIFAR-100, 1.5 on ImageNet.
        temperature: T; 3 on CIFAR-100, 1 on ImageNet.
    """

    gamma: float = 3.5
    temperature: float = 3.0

    paper = "Yang et al., 2023: From knowledge distillation to self-knowledge distillation"
    teacher_taps = ("logits",)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        settings = self.gamma, self.temperature
        return nkd_loss(student.logits, teacher.logits, batch.label, *settings)


def zipf_labels(log_p: jax.Array, weak_log_p: jax.Array, target: jax.Array) -> jax.Array:
    """Soft labels of the classes other than the target, `1 / rank`, normalised to sum 1.

    The rank of a class, from 1, is its position among all C classes in descending order of a score.
    The score adds the weak head's probability and the network's log-probability, each divided by
    one minus that of the target. The authors' code uses log-probabilities in the second summand
    alone, and so does this function.

    Args:
        log_p: (B, C) log-probabilities of the network.
        weak_log_p: (B, C) log-probabilities of the weak head.
        target: (B, C) bools, True for the label.

    Returns:
        (B, C) labels, 0 for the target; without gradient.
    """

    def share(x: jax.Array) -> jax.Array:
        own = jnp.where(target, x, 0).sum(axis=1, keepdims=True)
        return x / (1 - own + _EPS)

    score = lax.stop_gradient(share(jnp.exp(weak_log_p)) + share(log_p))
    rank = jnp.argsort(jnp.argsort(-score, axis=1), axis=1) + 1
    labels = jnp.where(target, 0, 1 / rank.astype(score.dtype))
    return labels / labels.sum(axis=1, keepdims=True)


class USKD(Term):
    """Self-distillation with soft labels from the network and a weak head; there is no teacher.

    The loss is `alpha L_t + beta L_n + mu L_w`. L_t is the cross-entropy of the label, whose weight
    is the squared probability p^2 of the label plus one minus the batch mean of p^2. L_n is the
    cross-entropy of the other classes with respect to `zipf_labels`. L_w is the cross-entropy, with
    a label smoothing of 0.1, of the weak head, a linear layer on the pooled map before the last;
    its gradient reaches that map. Agrees with `USKDLoss` of the authors' code. The largest
    intermediate array is (B, C), the logits.

    Attributes:
        alpha: weight of L_t; 0.1 on CIFAR-100, 1 on ImageNet.
        beta: weight of L_n; 0.1.
        mu: weight of L_w; 0.1 on CIFAR-100, 0.005 on ImageNet.
        axis_name: mapped axis over which the rows are distributed.
    """

    alpha: float = 0.1
    beta: float = 0.1
    mu: float = 0.1
    axis_name: str | None = None

    paper = "Yang et al., 2023: From knowledge distillation to self-knowledge distillation"
    per_sample = False
    not_negative = ("alpha", "beta")

    @nn.compact
    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> jax.Array:
        """The scalar loss. Raises `ValueError` if the network has no map before the last."""
        if len(student.features) < 2:
            raise ValueError(
                "USKD reads the feature map before the last, but the student's network has only "
                f"{len(student.features)}; choose another network"
            )
        valid = batch.mask > 0
        dtype = jnp.promote_types(student.logits.dtype, jnp.float32)
        logits, middle = (
            jnp.where(valid[:, None], x.astype(dtype), 0)
            for x in (student.logits, student.features[-2].mean(axis=(1, 2), dtype=dtype))
        )
        weak = Linear(logits.shape[1], name="fc")(middle)
        target = jax.nn.one_hot(batch.label, logits.shape[1], dtype=bool)
        binary, others = split_classes(logits, target)
        soft = zipf_labels(jax.nn.log_softmax(logits), jax.nn.log_softmax(weak), target)
        of_others = -jnp.sum(soft * others, axis=1)
        of_weak = cross_entropy(weak, batch.label, _SMOOTHING)
        rows = gather_rows(self.axis_name, binary[:, 0], of_others, of_weak, batch.mask)
        log_p, of_others, of_weak, mask = rows

        def mean(x: jax.Array) -> jax.Array:
            return jnp.where(mask > 0, x, 0).sum() / (mask > 0).sum(dtype=dtype)

        squares = lax.stop_gradient(jnp.exp(2 * log_p))
        of_target = -(squares + 1 - mean(squares)) * log_p
        return mean(self.alpha * of_target + self.beta * of_others + self.mu * of_weak)
