"""Per-sample weights of distillation terms: uniform, constant, WSLD and IPWD.

A weighting is a function of the two networks' outputs and the labels; it multiplies the per-sample
loss of the terms named in `config.weighting.terms`. Weights never carry a gradient. A new one is a
class like those below and one line in `WEIGHTINGS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from ipwd_jax.errors import unknown_name
from ipwd_jax.losses.base import Batch
from ipwd_jax.models.base import Outputs

_Array = TypeVar("_Array", np.ndarray, jax.Array)
# Settings of `config.weighting` that no weighting may have a field for.
_OF_ALL = ("name", "terms", "start_epoch", "clip", "batch_normalize", "average")
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


def wsld_weights(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
) -> jax.Array:
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


def ipwd_weights(h_kd: _Array, h_cls: _Array, ratio: str = "A") -> _Array:
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


@dataclasses.dataclass(frozen=True)
class Weighting:
    """What a weighting is. The attributes of the class are what it asks of the rest.

    The fields of a subclass, which is a frozen dataclass too, are its hyper-parameters, each with a
    default. They are settings of `config.weighting`, where those of all weightings stand side by
    side, so that equal names mean one setting.

    Attributes:
        weighs: False: every weight is 1, so that nothing is multiplied and nothing remembered.
        teacher_taps: which of the teacher's `Outputs` are read, by name of the field.
        memory: what `weights` records of every sample.
        choices: the values that a hyper-parameter may have, where they are few.
    """

    weighs: ClassVar[bool] = True
    teacher_taps: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def heads(self) -> Mapping[str, str]:
        """Extra heads of the student that must be trained; of each, what it is for.

        What it is for is a predicate that follows the weighting's name in an error message.
        """
        return {}

    def weights(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weight of each sample of the batch, (B,), and a (B,) record for each of `memory`.

        Args:
            student: logits (B, C), and `extra_logits` of its heads.
            teacher: what `teacher_taps` names; None: neither a term nor a weighting reads it.
            batch: rows of one device.
        """
        raise NotImplementedError

    def alternatives(self, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights (N,) by name whose correlation with the teacher's mass each epoch reports.

        Args:
            memory: of `init_memory`, after the epoch.
        """
        return {}


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """1 for every sample: the run is the same as without a weighting."""

    weighs = False

    def weights(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.ones_like(batch.mask), {}


@dataclasses.dataclass(frozen=True)
class Constant(Weighting):
    """One number for every sample.

    Attributes:
        constant: the number.
    """

    constant: float = 1.0

    def weights(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.full_like(batch.mask, self.constant), {}


@dataclasses.dataclass(frozen=True)
class WSLD(Weighting):
    """`wsld_weights` of the two networks' logits."""

    teacher_taps = ("logits",)

    def weights(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        assert teacher is not None
        return wsld_weights(student.logits, teacher.logits, batch.label), {}


@dataclasses.dataclass(frozen=True)
class IPWD(Weighting):
    """`ipwd_weights` of a distilled head and the label-only head `cls`.

    Attributes:
        kd_source: whose logits H_kd is of: "student", its own, or "head", the extra head `kd`.
        ratio: "A" is 1 + H_kd / H_cls, "B" is 1 + H_cls / H_kd.
        standardize: whether the logits of both heads are z-scored first.
    """

    kd_source: str = "student"
    ratio: str = "A"
    standardize: bool = True

    memory = ("h_kd", "h_cls")
    choices = {"kd_source": ("student", "head"), "ratio": ("A", "B")}  # noqa: RUF012

    def heads(self) -> Mapping[str, str]:
        heads = {"cls": "compares with the label-only head"}
        if self.kd_source == "head":
            heads["kd"] = "with config.weighting.kd_source=head compares the distilled head"
        return heads

    def weights(
        self, student: Outputs, teacher: Outputs | None, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        distilled = student.extra_logits["kd"] if self.kd_source == "head" else student.logits
        h_kd, h_cls = ipwd_scores(
            distilled, student.extra_logits["cls"], batch.label, self.standardize
        )
        return ipwd_weights(h_kd, h_cls, self.ratio), {"h_kd": h_kd, "h_cls": h_cls}

    def alternatives(self, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights of both directions, since the paper leaves open which it has."""
        return {
            ratio: ipwd_weights(memory["h_kd"], memory["h_cls"], ratio)
            for ratio in self.choices["ratio"]
        }


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "constant": Constant,
    "wsld": WSLD,
    "ipwd": IPWD,
}


def settings() -> dict[str, Any]:
    """The fields of all weightings and their defaults, as they stand in `config.weighting`.

    Raises:
        ValueError: a field has no default, or its name is taken: by a setting of all weightings,
            or by a field of another one with another default.
    """
    found: dict[str, Any] = {}
    for name, kind in WEIGHTINGS.items():
        for field in dataclasses.fields(kind):
            where = f"the field {field.name!r} of the weighting {name!r}"
            if not isinstance(field.default, bool | int | float | str):
                raise ValueError(f"{where} needs a default: a number, a string, True or False")
            taken = found.setdefault(field.name, field.default) != field.default
            if taken or field.name in _OF_ALL:
                raise ValueError(
                    f"{where} would be a second config.weighting.{field.name}, which has another "
                    "meaning or default; give it another name"
                )
    return found


def create(weighting: ConfigDict) -> Weighting:
    """The weighting that `config.weighting` names, with its hyper-parameters.

    Raises:
        UserError: there is no such weighting.
    """
    if weighting.name not in WEIGHTINGS:
        raise unknown_name("config.weighting.name", weighting.name, WEIGHTINGS)
    kind = WEIGHTINGS[weighting.name]
    return kind(**{field.name: weighting[field.name] for field in dataclasses.fields(kind)})


def teacher_taps(weighting: ConfigDict) -> frozenset[str]:
    """Fields of the teacher's `Outputs` that a weighting reads."""
    return frozenset(create(weighting).teacher_taps)


def init_memory(weighting: ConfigDict, size: int) -> dict[str, jax.Array]:
    """What a weighting remembers of every training sample, each (size,) float32.

    `weight` is the weight of the sample's latest visit, `average` the running mean where
    `weighting.average` asks for one; the rest is `Weighting.memory`. Zero before the first visit.
    """
    kind = create(weighting)
    if not kind.weighs:
        return {}
    names = ["weight", *(["average"] if weighting.average else []), *kind.memory]
    return {name: jnp.zeros(size, jnp.float32) for name in names}


def check(weighting: ConfigDict, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
    """Raises `ValueError` where a weighting does not return a number a sample for all it should.

    Nothing is computed; arguments as of `weigh`.
    """
    kind, rows = create(weighting), batch.mask.shape
    weights, record = jax.eval_shape(kind.weights, student, teacher, batch)
    found = {"the weights": weights.shape, **{name: x.shape for name, x in record.items()}}
    if found != dict.fromkeys(["the weights", *kind.memory], rows):
        raise ValueError(
            f"config.weighting.name={weighting.name} must return an array of shape (B,), here "
            f"{rows}, for {', '.join(['the weights', *kind.memory])}; found "
            + ", ".join(f"{name} {shape}" for name, shape in found.items())
        )


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
        student: logits (B, C), and the `extra_logits` that the weighting reads.
        teacher: what the weighting reads of it.
        batch: labels, indices, mask and epoch.
        memory: of `init_memory`.
        axis_name: mapped axis over which the global batch is spread.

    Returns:
        (B,) float32 weights without gradient, and the new memory, equal on all devices.
    """
    kind = create(weighting)
    if not kind.weighs:
        return jnp.ones_like(batch.mask), memory
    weights, record = kind.weights(student, teacher, batch)
    weights = lax.stop_gradient(weights)
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
