"""A run, assembled in one place from its config: start reading the code here.

`assemble(config, dataset, teacher)` returns an `Experiment`: the networks, heads, loss terms,
stages and optimisers of a run, and what each stage trains. It is immutable and holds no parameters.
It provides

* `initial_state(seed)`: the `TrainState` before the first step, a pytree that each step replaces;
* `begin(stage, state)`: the state at the first step of a stage, with a fresh optimiser;
* `train_step(stage)`: the compiled step of a stage, for one seed or for several in one program;
* `batches(seed, epoch)`: the samples that each step of an epoch sees, which depend on nothing but
  the seed and the epoch.

The loop (`loop.py`), the tests, the benchmarks and the notebooks all build runs in this way:

    experiment = assemble(config, dataset, teacher)
    state = parallel.replicate(experiment.begin(0, experiment.initial_state(seed=0)))
    step = experiment.train_step(0)
    for index, mask, _ in experiment.batches(seed=0, epoch=0):
        (state,) = step((state,), data, teacher_inputs, (index,), (mask,), (None,))

A run has a main stage and, if the config asks for it, a first stage before it, in which a term can
train parameters that it needs in the main stage (`Term.first_stage_params`). The computation of a
step is in `step.py`, the terms are in `losses/`, and the networks are in `models/`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Mapping

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import models, optim, packing, parallel, stages, state, step, student
from ipwd_jax.data import augment, views
from ipwd_jax.data.base import Dataset
from ipwd_jax.data.resident import Resident
from ipwd_jax.errors import UserError
from ipwd_jax.losses.base import Term
from ipwd_jax.models.heads import Heads
from ipwd_jax.stages import Stage
from ipwd_jax.state import TrainState
from ipwd_jax.teacher import Teacher
from ipwd_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The part of a run that is the same for every seed and from the first step to the last.

    Attributes:
        config: config of the run.
        dataset: data set on which the student is trained and evaluated.
        teacher: the teacher, or None if there is none.
        network: the student.
        pretrained: those of the student's variables that are not drawn, by their paths; also those
            that it has from the teacher.
        heads: the student's extra heads.
        stages: the stages in order; the last one is the main stage.
        steps_per_epoch: number of steps in an epoch; the last of them can have fewer samples.
        steps_per_call: number of steps in one call of the compiled program.
    """

    config: ConfigDict
    dataset: Dataset
    teacher: Teacher | None
    network: nn.Module
    pretrained: Mapping[tuple[str, ...], np.ndarray] | None
    heads: Heads
    stages: tuple[Stage, ...]
    steps_per_epoch: int
    steps_per_call: int

    @property
    def total_steps(self) -> int:
        """Number of steps in all stages together."""
        return self.stages[-1].first_step + self.stages[-1].epochs * self.steps_per_epoch

    @property
    def teacher_taps(self) -> frozenset[str]:
        """Names of the fields of the teacher's `Outputs` that any stage reads."""
        return frozenset().union(*(stage.teacher_taps for stage in self.stages))

    @property
    def rotated(self) -> bool:
        """Whether the networks see every image in four rotations in any stage."""
        return any(stage.rotated for stage in self.stages)

    @property
    def strong_view(self) -> bool:
        """Whether the networks also see a strong view of every image in any stage."""
        return any(stage.strong_view for stage in self.stages)

    def order_seed(self, seed: int) -> int:
        """Return the seed that decides the order and the views of the samples.

        This is `seed` itself, or the first seed if `config.share_order` is set.
        """
        return self.config.seeds[0] if self.config.share_order else seed

    def initial_state(self, seed: int) -> TrainState:
        """Return the state of the run of `seed` before its first step, without optimiser state."""
        terms = {name: term for stage in self.stages for name, term in stage.terms.items()}
        initial = _initial_state(self.config, self.dataset, self.network, self.heads, terms, seed)
        if not self.config.model.classifier_bias:
            key = state.classifier_key(jax.random.key(seed))
            classifier = student.without_bias(self.network, initial.network(), key)
            initial = state.with_network(initial, classifier)
        if self.pretrained is not None:
            initial = state.with_network(initial, self.pretrained)
        return dataclasses.replace(initial, key=jax.random.key(self.order_seed(seed)))

    def begin(self, stage: int, before: TrainState) -> TrainState:
        """Return the state at the first step of a stage, made from the state `before` it."""
        names = ["loss", *self.stages[stage].terms, "top1"]
        return state.begin_stage(before, self.stages[stage].optimizer, names)

    def step_spec(self, stage: int) -> step.StepSpec:
        """Return the static part of the steps of a stage."""
        config, this = self.config, self.stages[stage]
        return step.StepSpec(
            augmentation=views.Augmentation(
                crop_padding=config.data.crop_padding,
                flip=config.data.flip,
                operations=config.data.rand_augment,
                magnitude=config.data.rand_magnitude,
                mixup=config.data.mixup,
                cutmix=config.data.cutmix,
            ),
            precision=config.precision,
            sync_batch_norm=config.sync_batch_norm,
            look_ahead=config.teacher.look_ahead > 1,
            steps_per_epoch=self.steps_per_epoch,
            network=self.network,
            heads=self.heads,
            stage=this,
            answer=self.teacher.answer if self.teacher else None,
            flat=self._flat(this),
        )

    def _flat(self, stage: Stage) -> bool:
        """Whether vectors are faster than leaves and give the same result; see `StepSpec.flat`."""
        of_stage = self.config.first_stage if stage.pretrains else self.config
        everything = all(jax.tree.leaves(stage.trainable))
        return packing.vectors_pay() and everything and optim.elementwise(of_stage.optimizer.name)

    def train_step(self, stage: int) -> Callable:
        """Compile the step of a stage for as many seeds as it is called with.

        Returns:
            `step(states, data, teacher_inputs, index, mask, streamed) -> states`. All arguments but
            `data` and `teacher_inputs` are tuples with one element per seed: `states` as `begin`
            returns them, but on all devices, and donated; `index`, `mask` and `streamed` as
            `batches` yields them.
        """
        # JAX keeps a compiled function and what it refers to, so this one must not refer to the
        # experiment, with which the data and the teacher's answers would stay in memory.
        spec, share_order = self.step_spec(stage), self.config.share_order

        # The seeds are unrolled, because vmap would turn every convolution into a grouped one,
        # which is slower.
        def together(
            states: tuple[TrainState, ...],
            data: Resident,
            inputs: PyTree,
            index: tuple[jax.Array, ...],
            mask: tuple[jax.Array, ...],
            streamed: tuple[jax.Array | None, ...],
        ) -> tuple[TrainState, ...]:
            if share_order:
                # All seeds read the key, the step and the rows of the first, so that the compiler
                # recognises that they ask the teacher about the same images, and computes its
                # answers only once.
                first = states[0]
                states = tuple(
                    dataclasses.replace(s, key=first.key, step=first.step) for s in states
                )
                seeds = len(states)
                index, mask = index[:1] * seeds, mask[:1] * seeds
                streamed = streamed[:1] * seeds
            return tuple(
                step.train_step(spec, now, data, inputs, rows, valid, images)
                for now, rows, valid, images in zip(states, index, mask, streamed, strict=True)
            )

        return parallel.compile_train_step(together)

    def batches(
        self, seed: int, epoch: int, begin: int = 0, end: int | None = None
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Yield the index, the mask and any streamed images for each call of an epoch.

        Calls end at multiples of `steps_per_call`, even if the first one begins in between.

        Args:
            seed: seed of the run.
            epoch: number of the epoch within its stage, from 0.
            begin: the first step.
            end: the step before which to stop; None stands for the end of the epoch.

        Yields:
            `index` int32, `mask` float32, and `streamed` uint8 or None, each of shape (steps,
            devices, rows, ...), for the devices of this process.
        """
        train, order_seed = self.dataset.train, self.order_seed(seed)
        key = state.order_key(jax.random.key(order_seed))
        order = augment.epoch_order(key, epoch, len(train.labels))
        of_all = augment.epoch_batches(order, self.config.batch_size, parallel.device_count())
        index, mask = (rows[:, parallel.own()] for rows in of_all)
        end = len(index) if end is None else end
        flat = index[begin:end].reshape(end - begin, -1)
        with contextlib.ExitStack() as stack:
            if not isinstance(train.images, np.ndarray):
                crops = 1 + self.strong_view
                source = train.images.batches(flat, order_seed, epoch, True, crops)
                images = stack.enter_context(contextlib.closing(source))
            while begin < end:
                until = min((begin // self.steps_per_call + 1) * self.steps_per_call, end)
                streamed = None
                if train.streamed:
                    batch = np.stack([next(images) for _ in range(begin, until)])
                    streamed = batch.reshape(*index[begin:until].shape, *batch.shape[2:])
                yield index[begin:until], mask[begin:until], streamed
                begin = until


def assemble(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Teacher | None,
    pretrained: Mapping[tuple[str, ...], np.ndarray] | None = None,
) -> Experiment:
    """Assemble a run.

    Args:
        config: config of the run, as `validate.validate` accepts it.
        dataset: data set on which the student is trained and evaluated.
        teacher: the teacher. If it is None although the config names one, the parts of the run are
            checked against the shapes of its network, so that no teacher is trained for a run whose
            parts do not fit together.
        pretrained: those of the student's variables that are not drawn, by their paths, as
            `pretrained.load` returns them.

    Raises:
        UserError: the terms do not fit the data, the networks or each other, or `trainable` names
            something that does not exist.
    """
    classes = len(dataset.class_names)
    axis_name = parallel.AXIS if config.sync_batch_norm else None
    if teacher is None:
        _check_networks(config, dataset)
    network = student.network_of(config, classes, dataset.train.images.shape[1:], axis_name)
    parts = config_lib.stages(config)
    terms = [stages.terms(config, part, dataset, teacher) for part in parts]
    of_all = {name: term for of_stage in terms for name, term in of_stage.items()}
    sources = {head: source for term in of_all.values() for head, source in term.heads.items()}
    separate = models.create(config.model.name, classes, axis_name)
    heads = Heads(classes, sources, separate if "network" in sources.values() else None)
    try:
        initial = jax.eval_shape(lambda: _initial_state(config, dataset, network, heads, of_all, 0))
    except ValueError as error:  # a term or the weighting cannot process the shapes
        raise UserError(str(error)) from error
    if teacher:
        for term in of_all.values():
            of_head = term.inherited(teacher).items()
            known = {("params", "head", *path): value for path, value in of_head}
            pretrained = {**(pretrained or {}), **known} or None
    steps_per_epoch = math.ceil(len(dataset.train.labels) / config.batch_size)
    one_by_one = jax.default_backend() == "cpu" or dataset.train.streamed
    default = 1 if one_by_one else config.log_every_steps
    ahead = config.teacher.look_ahead if config.teacher.name else 0
    return Experiment(
        config=config,
        dataset=dataset,
        teacher=teacher,
        network=network,
        pretrained=pretrained,
        heads=heads,
        stages=stages.create(config, parts, terms, initial.params, network, heads, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        steps_per_call=ahead or config.steps_per_call or default,
    )


def _check_networks(config: ConfigDict, dataset: Dataset) -> None:
    """Raise `UserError` if the student or the teacher cannot be called as the run calls it."""
    given = config.teacher.workdir or config.teacher.pretrained
    # Both can be the same network, which is then trained.
    modes = {config.teacher.name: config.teacher.train_mode or not given, config.model.name: True}
    for name, train in modes.items():
        if name:
            shape = dataset.train.images.shape[1:]
            student.check_network(name, len(dataset.class_names), shape, train)


def _initial_state(
    config: ConfigDict,
    dataset: Dataset,
    network: nn.Module,
    heads: Heads,
    terms: Mapping[str, Term],
    seed: int,
) -> TrainState:
    classes, train = len(dataset.class_names), dataset.train
    teacher = models.create(config.teacher.name, classes) if config.teacher.name else None
    shape, size = train.images.shape[1:], len(train.labels)
    return state.init_state(seed, network, heads, terms, teacher, config.weighting, shape, size)
