"""The stages of a run: what each of them computes, trains and updates, and for how long."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from ipwd_jax import losses, models, optim, parallel, student
from ipwd_jax.data.base import Dataset
from ipwd_jax.errors import UserError
from ipwd_jax.image_checks import check_images
from ipwd_jax.losses import weighting
from ipwd_jax.losses.base import Term
from ipwd_jax.models.heads import Heads
from ipwd_jax.teacher import Teacher
from ipwd_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: "main", or "first" for the stage before it.
        epochs: number of epochs.
        pretrains: whether this is the first stage, in which terms with `first_stage_params` are
            applied by their method `pretrain`.
        loss: weight of each active term in the loss.
        terms: the active terms, by name.
        weighting: `config.weighting` if the stage is weighted, else None.
        learning_rate: learning rate of each step.
        optimizer: optimiser of all parameters, which leaves those that are not trained unchanged.
        trainable: bools in the structure of `TrainState.params`.
        first_step: number of steps in the stages before this one.
    """

    name: str
    epochs: int
    pretrains: bool
    loss: Mapping[str, float]
    terms: Mapping[str, Term]
    weighting: ConfigDict | None
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    trainable: PyTree
    first_step: int

    @property
    def rotated(self) -> bool:
        """Whether the networks see every image in four rotations."""
        return any(term.rotations for term in self.terms.values())

    @property
    def strong_view(self) -> bool:
        """Whether the networks also see a strong view of every image."""
        return any(term.strong_view for term in self.terms.values())

    @property
    def teacher_taps(self) -> frozenset[str]:
        """Names of the fields of the teacher's `Outputs` that the terms or the weighting read."""
        taps = {tap for term in self.terms.values() for tap in term.teacher_taps}
        return frozenset(
            {*taps, *(weighting.create(self.weighting).teacher_taps if self.weighting else ())}
        )


def create(
    config: ConfigDict,
    parts: Sequence[ConfigDict],
    terms: Sequence[Mapping[str, Term]],
    params: PyTree,
    network: nn.Module,
    heads: Heads,
    steps_per_epoch: int,
) -> tuple[Stage, ...]:
    """Return the stages of a run, in order.

    Args:
        config: config of the run.
        parts: the settings of each stage, as `config.stages` returns them.
        terms: the terms of each stage, as `terms` returns them.
        params: shapes of `TrainState.params`.
        network: the student.
        heads: the student's extra heads.
        steps_per_epoch: number of steps in an epoch.

    Raises:
        UserError: `trainable` names something that does not exist.
    """
    stages, first_step = [], 0
    for part, of_stage in zip(parts, terms, strict=True):
        rate = optim.schedule(part.optimizer, steps_per_epoch, part.epochs)
        trainable = _trainable(config, part, of_stage, params, network, heads)
        stage = Stage(
            name=part.name,
            epochs=part.epochs,
            pretrains=part.pretrains,
            loss={name: part.loss[name] for name in of_stage},
            terms=of_stage,
            weighting=config.weighting if part.weighted else None,
            learning_rate=rate,
            optimizer=optim.only(trainable, optim.create(part.optimizer, rate)),
            trainable=trainable,
            first_step=first_step,
        )
        stages.append(stage)
        first_step += part.epochs * steps_per_epoch
    return tuple(stages)


def check_trained(stages: Sequence[Stage]) -> None:
    """Raise `UserError` if a stage uses parameters of a term that no stage up to it trains."""
    for i, stage in enumerate(stages):
        for name, part, term in _parts_used(stage):
            if any(jax.tree.leaves([s.trainable["terms"][name][part] for s in stages[: i + 1]])):
                continue
            if stage.pretrains:
                advice = f"add 'terms/{name}' to config.first_stage.trainable"
            elif part in term.first_stage_params:
                advice = (
                    "train it in a first stage, with --config.first_stage.epochs, "
                    f"--config.first_stage.loss.{name} and --config.first_stage.trainable"
                )
            else:
                advice = f"add 'terms/{name}' to config.trainable"
            raise UserError(
                f"config.{'first_stage.' if stage.pretrains else ''}loss.{name} needs "
                f"terms/{name}/{part}, which neither this stage nor an earlier one trains, so that "
                f"it would keep its initial value; {advice}"
            )


def _parts_used(stage: Stage) -> Iterator[tuple[str, str, Term]]:
    """Yield name, part and term for each part of the terms' parameters that a stage uses."""
    for name, term in stage.terms.items():
        for part in stage.trainable["terms"].get(name, {}):
            # A first stage of such a term computes its `pretrain` alone.
            if part in term.first_stage_params or not (stage.pretrains and term.first_stage_params):
                yield name, part, term


def terms(
    config: ConfigDict, stage: ConfigDict, dataset: Dataset, teacher: Teacher | None
) -> dict[str, Term]:
    """Return the terms of a stage, checked against the data and adapted to the teacher.

    Args:
        config: config of the run.
        stage: the settings of the stage, as `config.stages` returns them.
        dataset: data set of the run.
        teacher: the teacher, if it is there already.

    Raises:
        UserError: a term does not fit the data, the images or the other terms.
    """
    of_run = {
        "axis_name": parallel.AXIS,
        "train_size": len(dataset.train.labels),
        "epochs": stage.epochs,
    }
    found = losses.create(stage.loss, config.terms, of_run)
    check_images(config, found, dataset)
    name = config.teacher.name
    network = models.create(name, len(dataset.class_names)) if name else None
    for term in found.values():
        term.check(dataset, network)
    return {name: term.of_teacher(teacher) if teacher else term for name, term in found.items()}


def _trainable(
    config: ConfigDict,
    stage: ConfigDict,
    terms: Mapping[str, Term],
    params: PyTree,
    network: nn.Module,
    heads: Heads,
) -> PyTree:
    """Return bools in the structure of `params`: whether a stage trains each parameter.

    A stage does not train parameters that only other stages use.
    """
    used = {source for term in terms.values() for source in term.heads.items()}
    frozen = student.never_trained(config, network)
    frozen += [
        f"heads/{'network' if source == 'network' else name}"
        for name, source in heads.sources.items()
        if (name, source) not in used
    ]
    frozen += [f"terms/{name}" for name in params["terms"] if name not in terms]
    if not stage.pretrains:
        frozen += [f"terms/{name}/{p}" for name, t in terms.items() for p in t.first_stage_params]
    without_params = [f"terms/{name}" for name in terms]
    return optim.trainable_mask(
        params, stage.trainable, network.head_modules, frozen, without_params
    )
