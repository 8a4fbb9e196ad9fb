"""Per-sample weights of distillation terms: uniform, constant, WSLD and IPWD.

A weighting computes a weight for each sample from the outputs of the two networks and the labels.
The weights multiply the per-sample losses of the terms named in `config.weighting.terms`, and never
carry a gradient. To add a weighting, write a class like those below and add a line to `WEIGHTINGS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from ipwd_jax.errors import unknown_name
from ipwd_jax.losses.base import Batch
from ipwd_jax.losses.taps import check_taps, only_declared
from ipwd_jax.models.base import Outputs

_Array = TypeVar("_Array", np.ndarray, jax.Array)
# The weights (B,) of a batch, and arrays by name.
Weights: TypeAlias = tuple[jax.Array, dict[str, jax.Array]]
# Settings in `config.weighting` that belong to no single weighting; no field can have their names.
_OF_ALL = ("name", "terms", "start_epoch", "clip", "batch_normalize", "average")
_LARGEST_RATIO = 1e26  # times a loss and summed over samples, it still fits into float32


def surprise(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each sample with its label, with a small relative error even near 0.

    It is computed as `log(1 + sum over the other classes of exp(z_j - z_label))`. The log-softmax
    that the losses use has a small absolute error instead: in float32, it returns 0 for values
    below about 1e-7. This makes no difference to a loss, but it does to a ratio of two such values.

    Args:
        logits: (B, C), C >= 2.
        labels: (B,) integers in 0..C-1.

    Returns:
        (B,) in nats, of the dtype of `logits`; 0 only if the value is too small for that dtype.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    is_own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return jax.nn.softplus(jax.nn.logsumexp(logits - own, axis=1, where=~is_own))


def wsld_weights(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
) -> jax.Array:
    """`1 - exp(-CE(student) / CE(teacher))` of each sample, at temperature 1.

    From Zhou et al., 2021 (Rethinking soft labels: a bias-variance trade-off perspective). Agrees
    with the authors' code. On CIFAR-100 it is used with `kd.cross_entropy`, T = 4 and a loss weight
    of 2.25.

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
    """The z-scores of each sample's logits over its classes: (B, C) -> (B, C).

    The standard deviation is the biased one.
    """
    mean = logits.mean(axis=1, keepdims=True)
    return (logits - mean) / (logits.std(axis=1, keepdims=True) + 1e-6)


def ipwd_scores(
    kd_logits: jax.Array, cls_logits: jax.Array, labels: jax.Array, standardize: bool = True
) -> tuple[jax.Array, jax.Array]:
    """How badly each of the two heads explains the label: `(H_kd, H_cls)`.

    As far as Niu et al., 2022, describe it, the score is the cross-entropy of the logits, which are
    standardised so that the scales of the two heads do not matter.

    Args:
        kd_logits: (B, C), logits of the distilled head, which is trained with the teacher.
        cls_logits: (B, C), logits of the label-only head, which is trained with labels only.
        labels: (B,) integers.
        standardize: whether `standardized` is applied to the logits first.

    Returns:
        Two (B,) arrays in nats, detached.
    """
    if standardize:
        kd_logits, cls_logits = standardized(kd_logits), standardized(cls_logits)
    return lax.stop_gradient((surprise(kd_logits, labels), surprise(cls_logits, labels)))


def ipwd_weights(h_kd: _Array, h_cls: _Array, ratio: str = "A") -> _Array:
    """The inverse propensity of each sample, computed from its two scores; never below 1.

    With ratio "A" the weight is `1 + H_kd / H_cls`, so the propensity is `H_cls / (H_cls + H_kd)`:
    samples that the distilled head explains badly are under-represented in the teacher's
    predictions. Ratio "B" inverts the quotient. The paper leaves the direction open.
    An inverse propensity should be negatively correlated with the teacher's class mass, and every
    IPWD run reports this correlation for both ratios.

    Only the float type limits a weight. A score below its smallest normal number, 1e-38 in float32,
    is replaced by that number, so that the weight is 2 if both heads are certain; and the ratio is
    at most 1e26. With 1,000 classes, weights of up to 1e12 occur where the label-only head is
    certain and the distilled head is wrong; `weighting.clip` limits them.

    Args:
        h_kd: (B,) scores of the distilled head, NumPy or JAX.
        h_cls: (B,) scores of the label-only head.
        ratio: "A" or "B".

    Returns:
        (B,) weights.
    """
    h_kd, h_cls = (h.clip(float(jnp.finfo(h.dtype).tiny)) for h in (h_kd, h_cls))
    above, below = {"A": (h_kd, h_cls), "B": (h_cls, h_kd)}[ratio]
    return 1 + above / below.clip(above / _LARGEST_RATIO)


@dataclasses.dataclass(frozen=True)
class Weighting:
    """The base class of all weightings; its class attributes declare what a weighting needs.

    The fields of a subclass, which must be a frozen dataclass too, are its hyper-parameters, each
    with a default. They become settings in `config.weighting`. The settings of all weightings share
    this section, so that fields of the same name are the same setting.

    Attributes:
        weighs: whether the weights can differ from 1. If False, nothing is multiplied or stored.
        varies: whether the weights can differ between samples and between epochs.
        teacher_taps: names of the fields of the teacher's `Outputs` that the weighting reads.
        memory: names of the values that `weights` records for every sample.
        mixed_images: whether the weights are defined for images that MixUp or CutMix has mixed.
        choices: the allowed values of each hyper-parameter that has only a few.
    """

    weighs: ClassVar[bool] = True
    varies: ClassVar[bool] = True
    teacher_taps: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[tuple[str, ...]] = ()
    mixed_images: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def heads(self) -> Mapping[str, str]:
        """The extra heads of the student that must be trained, each with its purpose.

        The purpose is a predicate that follows the name of the weighting in an error message.
        """
        return {}

    def weights(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Weights:
        """The weight of each sample, (B,), and a record (B,) for each name in `memory`.

        Args:
            student: its logits (B, C), and the `extra_logits` of its heads.
            teacher: the fields that `teacher_taps` names; None if neither a term nor the weighting
                reads any.
            batch: the rows of one device.
        """
        raise NotImplementedError

    def alternatives(self, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights (N,) by name; their correlation with the class mass is reported every epoch.

        Args:
            memory: the memory of `init_memory` as it is after the epoch.
        """
        return {}


@dataclasses.dataclass(frozen=True)
class Uniform(Weighting):
    """A weight of 1 for every sample, as if there were no weighting."""

    weighs = False
    mixed_images = True

    def weights(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Weights:
        return jnp.ones_like(batch.mask), {}


@dataclasses.dataclass(frozen=True)
class Constant(Weighting):
    """The same weight for every sample.

    Attributes:
        constant: the weight.
    """

    constant: float = 1.0

    varies = False
    mixed_images = True

    def weights(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Weights:
        return jnp.full_like(batch.mask, self.constant), {}


@dataclasses.dataclass(frozen=True)
class WSLD(Weighting):
    """`wsld_weights` of the two networks' logits."""

    teacher_taps = ("logits",)

    def weights(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Weights:
        assert teacher is not None
        return wsld_weights(student.logits, teacher.logits, batch.label), {}


@dataclasses.dataclass(frozen=True)
class IPWD(Weighting):
    """`ipwd_weights` of a distilled head and the label-only head `cls`.

    Attributes:
        kd_source: the distilled head: "student" for the student's own head, "head" for the extra
            head `kd`.
        ratio: "A" for 1 + H_kd / H_cls, "B" for 1 + H_cls / H_kd.
        standardize: whether the logits of both heads are standardised to z-scores first.
    """

    kd_source: str = "student"
    ratio: str = "A"
    standardize: bool = True

    memory = ("h_kd", "h_cls")
    mixed_images = True
    choices = {"kd_source": ("student", "head"), "ratio": ("A", "B")}  # noqa: RUF012

    def heads(self) -> Mapping[str, str]:
        heads = {"cls": "needs the label-only head"}
        if self.kd_source == "head":
            heads["kd"] = "with config.weighting.kd_source=head needs the distilled head"
        return heads

    def weights(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Weights:
        distilled = student.extra_logits["kd"] if self.kd_source == "head" else student.logits
        label_only = student.extra_logits["cls"]
        h_kd, h_cls = batch.over_labels(
            lambda label: ipwd_scores(distilled, label_only, label, self.standardize)
        )
        return ipwd_weights(h_kd, h_cls, self.ratio), {"h_kd": h_kd, "h_cls": h_cls}

    def alternatives(self, memory: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights of both ratios, because the paper leaves open which one it uses."""
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
    """The fields of all weightings and their defaults, as they appear in `config.weighting`.

    Raises:
        ValueError: a field has no default, or its name is already taken by a setting that is common
            to all weightings or by another weighting's field with a different default.
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
                    f"{where} clashes with the setting config.weighting.{field.name}, which has "
                    "another meaning or default; rename the field"
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


def init_memory(weighting: ConfigDict, size: int) -> dict[str, jax.Array]:
    """What a weighting stores for every training sample, each (size,) float32 and initially 0.

    `weight` is the weight that the sample had when it was last seen. `average`, which exists only
    if `weighting.average` is set, is the running mean of its weights. The other names are those of
    `Weighting.memory`.
    """
    kind = create(weighting)
    if not kind.weighs:
        return {}
    names = ["weight", *(["average"] if weighting.average else []), *kind.memory]
    return {name: jnp.zeros(size, jnp.float32) for name in names}


def check(weighting: ConfigDict, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
    """Raises `ValueError` if a weighting does not return one number per sample for each name.

    The names are the weights themselves and those in `Weighting.memory`. Only shapes are computed.
    The arguments are those of `weigh`.
    """
    kind, rows = create(weighting), batch.mask.shape
    named = f"config.weighting.name={weighting.name}"
    check_taps(named, kind.teacher_taps)
    teacher = only_declared(teacher, kind.teacher_taps)
    returned = jax.eval_shape(kind.weights, student, teacher, batch)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"{named} must return weights and a record, or {{}}; found {returned}")
    weights, record = returned
    found = {"the weights": weights.shape, **{name: x.shape for name, x in record.items()}}
    if found != dict.fromkeys(["the weights", *kind.memory], rows):
        raise ValueError(
            f"{named} must return an array of shape (B,), here {rows}, for "
            f"{', '.join(['the weights', *kind.memory])}; found "
            + ", ".join(f"{name} {shape}" for name, shape in found.items())
        )


def weigh(
    weighting: ConfigDict,
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    memory: dict[str, jax.Array],
    axis_name: str | None = None,
) -> Weights:
    """The weights of one batch, and the memory updated with them.

    The running mean, the clip, the division by the batch mean and `start_epoch` are applied in this
    order.

    Args:
        weighting: `config.weighting`.
        student: its logits (B, C), and the `extra_logits` that the weighting reads.
        teacher: the fields of the teacher's outputs that the weighting reads.
        batch: the rows of one device, with labels, indices, mask and epoch.
        memory: the memory of `init_memory`, as updated so far.
        axis_name: mapped axis over which the global batch is distributed.

    Returns:
        (B,) float32 weights without gradient, and the new memory, which is equal on all devices.
    """
    kind = create(weighting)
    if not kind.weighs:
        return jnp.ones_like(batch.mask), memory
    weights, record = lax.stop_gradient(kind.weights(student, teacher, batch))
    if weighting.average:
        previous = memory["average"][batch.index]
        decay = jnp.where(previous == 0, 0.0, weighting.average)
        weights = decay * previous + (1 - decay) * weights
        record = {**record, "average": weights}
    if weighting.clip:
        weights = jnp.minimum(weights, weighting.clip)
    if weighting.batch_normalize:
        total, count = (batch.mask * weights).sum(), batch.mask.sum()
        if axis_name:
            total, count = lax.psum((total, count), axis_name)
        weights = weights * count / jnp.where(total > 0, total, 1)  # they can all be 0
    if weighting.start_epoch:
        weights = jnp.where(batch.epoch < weighting.start_epoch, 1.0, weights)
    record = {**record, "weight": weights}
    # Padding rows get an index past the end, so that their update is dropped.
    index = jnp.where(batch.mask > 0, batch.index, len(memory["weight"]))
    if axis_name:
        index, record = lax.all_gather((index, record), axis_name, tiled=True)
    memory = {name: memory[name].at[index].set(record[name], mode="drop") for name in memory}
    return weights, memory
