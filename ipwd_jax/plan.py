"""What a run will do, in words, before it begins."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ipwd_jax import config as config_lib
from ipwd_jax import device_memory, models, parallel, xla
from ipwd_jax import teacher as teacher_lib
from ipwd_jax.assemble import Experiment, assemble
from ipwd_jax.data.resident import resident
from ipwd_jax.progress import duration
from ipwd_jax.state import network_shapes

_TIMED = 3  # calls of the step
_NVIDIA = pathlib.Path("/dev/nvidiactl")  # exists where a driver is loaded


def describe(
    experiment: Experiment,
    workdirs: list[pathlib.Path],
    teacher: pathlib.Path | None,
    costs: bool = False,
) -> str:
    """Describe the data, networks, loss, steps, device and files of a run, one line each.

    Args:
        experiment: of the run; its teacher is not looked at.
        workdirs: of the run of each seed.
        teacher: work directory of the teacher, if there is one.
        costs: whether to add the parameters and multiply-adds of the networks, which takes a
            second or more.
    """
    config, dataset = experiment.config, experiment.dataset
    shape = dataset.train.images.shape[1:]
    classes = len(dataset.class_names)
    splits = {"training": dataset.train, **dataset.evaluated}
    *first, last = (f"{len(split.labels):,} {name}" for name, split in splits.items())
    lines = {
        "data": f"{dataset.name}: {', '.join(first)} and {last} images of "
        f"{'x'.join(map(str, shape))}, {classes} classes ({_listed(dataset.class_names)})",
    }
    if teacher:
        network = models.create(config.teacher.name, classes)
        cost = _cost(network, shape) if costs else ""
        how = f"from {teacher}"
        if config.teacher.pretrained:
            how = f"{config.teacher.pretrained}, in {teacher}"
        elif not (teacher / "result.json").exists():
            how = f"trained first, {config.teacher.epochs} epochs, in {teacher}"
        lines["teacher"] = f"{config.teacher.name}{cost} {how}"
    cost = _cost(experiment.network, shape) if costs else ""
    lines["student"] = f"{config.model.name}{cost}"
    for stage in experiment.stages:
        weighted = set(config.weighting.terms) if stage.weighting is not None else set()
        parts = (
            f"{weight:g} {name}{f' weighted by {config.weighting.name}' * (name in weighted)}"
            for name, weight in stage.loss.items()
        )
        of_stage = f"stage {stage.name!r}: " if len(experiment.stages) > 1 else ""
        lines[f"loss {stage.name}"] = of_stage + " + ".join(parts)
        lines[f"steps {stage.name}"] = (
            f"{of_stage}{stage.epochs} epochs of {experiment.steps_per_epoch} steps of "
            f"{config.batch_size} images"
        )
    lines["device"] = f"{parallel.device_count()} x {jax.devices()[0].device_kind}, "
    lines["device"] += config.precision
    if profile := xla.active():
        lines["device"] += f", XLA profile {profile}"
    if jax.default_backend() == "cpu" and _NVIDIA.exists():
        lines["device"] += (
            "; this JAX cannot use the NVIDIA GPU of this machine: pip install -U 'jax[cuda12]'"
        )
    lines["folder"] = ", ".join(map(str, workdirs))
    return "\n".join(f"{name.split()[0]:<9}{text}" for name, text in lines.items())


def _listed(names: Sequence[str]) -> str:
    """Return the first three of some names, and an ellipsis if there are more."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def costs(experiment: Experiment, runs: int, teacher_workdir: pathlib.Path | None) -> str:
    """Estimate the time and the memory that a run takes, and the time of its teacher; a line each.

    The programs are compiled, which takes seconds to minutes, and take a few steps.

    Args:
        experiment: of the run; its teacher is replaced by an untrained one.
        runs: number of seeds.
        teacher_workdir: work directory of the teacher, if there is one.

    Raises:
        UserError: a step does not fit into the memory.
    """
    config, dataset, text = experiment.config, experiment.dataset, ""
    if teacher_workdir:
        of_teacher = assemble(config_lib.teacher_config(config), dataset, None)
        variables = of_teacher.initial_state(seed=0).network()
        # What some terms want to know of a trained teacher is computed from an image of each class.
        first = np.unique(dataset.train.labels, return_index=True)[1].astype(np.int32)
        few = dataclasses.replace(dataset, train=dataset.train.take(first))
        teacher = teacher_lib.from_variables(config, variables, few)
        any_logits = np.zeros((1, len(dataset.class_names)), np.float32)
        teacher = dataclasses.replace(teacher, train_logits=any_logits)
        experiment = assemble(config, dataset, teacher, experiment.pretrained)
        if not (config.teacher.pretrained or (teacher_workdir / "result.json").exists()):
            text = f"{duration(_measured(of_teacher)[0])} for the epochs of the teacher, "
    seconds, size = _measured(experiment)
    text += f"{duration(runs * seconds)} for those of the student"
    asked = " that asks the teacher in every step" if teacher_workdir else ""
    of_seed = " for each seed" if runs > 1 else ""
    return (
        f"time     about {text}{asked}; evaluation aside\n"
        f"memory   {size / 2**20:,.0f} MiB on each device{of_seed}, without cached answers"
    )


def _measured(experiment: Experiment) -> tuple[float, int]:
    """Estimate the seconds of all epochs, from a few steps of the main stage, and measure its size.

    Compilation and evaluation are left out. The size is the number of bytes on each device.
    """
    index, dataset = len(experiment.stages) - 1, experiment.dataset
    train_step = experiment.train_step(index)
    states = (parallel.replicate(experiment.begin(index, experiment.initial_state(seed=0))),)
    data = parallel.replicate(resident(dataset, dataset.train))
    inputs = experiment.teacher.inputs if experiment.teacher else {}
    calls, timed, size = experiment.batches(seed=0, epoch=0), [], 0
    with contextlib.closing(calls):
        for rows in itertools.islice(calls, 1 + _TIMED):
            arguments = states, data, inputs, *((part,) for part in rows)
            size = size or device_memory.check(train_step, *arguments)
            started = time.monotonic()
            states = train_step(*arguments)
            jax.block_until_ready(states)
            timed.append((time.monotonic() - started) / len(rows[0]))
    # The first call loads the program; where an epoch is a single call there is no other.
    return min(timed[1:] or timed) * experiment.total_steps, size


def disk(experiment: Experiment) -> int:
    """Return the bytes that the checkpoints of one run take at most."""

    def size(stage: int) -> int:
        state = jax.eval_shape(lambda: experiment.begin(stage, experiment.initial_state(seed=0)))
        leaves = jax.tree.leaves([state, state.network(), state.network()])  # `last` and `best`
        numbers = [leaf for leaf in leaves if hasattr(leaf.dtype, "itemsize")]
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in numbers)

    kept = experiment.config.checkpoint.keep + 1  # one more while the newest is written
    return kept * max(map(size, range(len(experiment.stages))))


def _cost(network: nn.Module, shape: tuple[int, ...]) -> str:
    """Return the parameters of a network and its multiply-adds for one image, in brackets."""
    variables = network_shapes(network, shape)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    lowered = jax.jit(network.apply).lower(variables, image)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    return f" ({parameters:,} parameters, {flops / 2e6:,.1f} M multiply-adds)"
