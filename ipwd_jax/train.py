"""A run from its config to its result: checks, teacher, resume, training."""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import evaluate, losses, models, optim, parallel, step, view_cache, writers
from ipwd_jax import teacher as teacher_lib
from ipwd_jax import workdir as workdir_lib
from ipwd_jax.checkpoint import Checkpoints, Position, Snapshot, load_network
from ipwd_jax.data import load as load_data
from ipwd_jax.data.base import Dataset, fingerprint
from ipwd_jax.data.resident import resident
from ipwd_jax.errors import UserError
from ipwd_jax.loop import Loop, Member, Run, Stage
from ipwd_jax.models.heads import Heads
from ipwd_jax.state import TrainState, init_state, network_shapes
from ipwd_jax.teacher import Teacher


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    dataset: Dataset | None = None,
    teacher_only: bool = False,
) -> dict[str, Any]:
    """Trains what `config` says, a missing teacher first; goes on where it was stopped.

    Args:
        config: of `ipwd_jax.config.default`, changed.
        workdir: folder of the run; made when missing. With `config.seeds` each seed's run has its
            own, this name and `_seed0`, `_seed1`..., and is the same as if it ran alone.
        dataset: in place of `config.data.name`, as made by `ipwd_jax.data.from_arrays`.
        teacher_only: stop when the teacher is there.

    Returns:
        What `result.json` holds: of the student's run, or of the teacher's; with `config.seeds`
        `{"name": ..., "seeds": [...]}` with that of each.

    Raises:
        UserError: something that the user can mend is wrong; the message says what.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    workdir = pathlib.Path(workdir)
    config_lib.validate(config)
    if teacher_only and not config.teacher.name:
        raise UserError("this config has no teacher; set --config.teacher.name to a network")
    dataset = dataset or load_data(config.data)
    _check_fit(config, dataset)
    _check_terms(config, dataset)
    checksums = {"data": fingerprint(dataset)}
    runs = {} if teacher_only else _of_each_seed(config, workdir)
    with contextlib.ExitStack() as locks:
        for folder in runs:
            locks.enter_context(workdir_lib.locked(folder))
        _claim(runs, checksums)
        teacher = None
        if config.teacher.name:
            teacher_workdir = teacher_lib.find_workdir(config, workdir)
            teacher_result = _ensure_teacher(config, teacher_workdir, dataset, checksums)
            if teacher_only:
                return teacher_result
            teacher = teacher_lib.load(config, teacher_workdir, dataset)
            checksums["teacher"] = teacher.checksum
            _claim(runs, checksums)
        results = _train(runs, dataset, teacher)
    return {"name": config.name, "seeds": results} if config.seeds else results[0]


def _of_each_seed(config: ConfigDict, workdir: pathlib.Path) -> dict[pathlib.Path, ConfigDict]:
    """Work directory -> config of each seed's run, as it would be alone."""
    if not config.seeds:
        return {workdir: config}
    runs = {}
    for seed in config.seeds:
        own = config.copy_and_resolve_references()
        own.seed = seed
        runs[workdir.with_name(f"{workdir.name}_seed{seed}")] = own
    return runs


def _claim(runs: Mapping[pathlib.Path, ConfigDict], checksums: Mapping[str, str]) -> None:
    for workdir, config in runs.items():
        workdir_lib.claim(workdir, config, checksums)


def evaluate_run(
    config: ConfigDict, workdir: str | pathlib.Path, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Measures the newest checkpoint of a run on the test set of `config.data`.

    Args:
        config: names the network and the data, which may be another split than in training.
        workdir: of the run.
        dataset: in place of `config.data.name`.

    Returns:
        Metrics of the `last` and of the `best` epoch, also written to `eval.json`.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network.
    """
    workdir = pathlib.Path(workdir)
    config_lib.validate(config)
    dataset = dataset or load_data(config.data)
    _check_fit(config, dataset)
    network = models.create(config.model.name, len(dataset.class_names))
    template = network_shapes(network, dataset.train.images.shape[1:])
    predict = evaluate.make_predict(network.apply)
    data = parallel.replicate(resident(dataset, dataset.test))
    result: dict[str, Any] = {
        "data": dataset.name,
        "network": config.model.name,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(template["params"])),
        "seed": config.seed,
    }
    for which in ("last", "best"):
        variables, position = load_network(workdir, which, template)
        logits = evaluate.predict_all(
            predict, variables, data, dataset.test, config.eval_batch_size
        )
        epochs = {"last": len(position.history), "best": position.best_epoch}
        result[which] = {
            "epoch": epochs[which],
            **evaluate.score(logits, dataset.test.labels),
        }
    writers.write_json(workdir / "eval.json", result)
    return result


def _check_fit(config: ConfigDict, dataset: Dataset) -> None:
    """Raises `UserError` where the data does not fit the networks or the batches."""
    size, height, width, _ = dataset.train.images.shape
    networks = {"batch_size": config.model.name, "teacher.batch_size": config.teacher.name}
    for key, name in networks.items():
        batch_size = config.teacher.batch_size if "." in key else config.batch_size
        if name:
            models.check_input(name, height, width)
        if name and batch_size > size:
            raise UserError(
                f"config.{key} is {batch_size}, but {dataset.name} has only {size} training images"
            )


def _check_terms(config: ConfigDict, dataset: Dataset) -> None:
    """Raises `UserError` where the terms do not fit the data, the networks or each other."""
    labels, (_, height, width, _) = dataset.train.labels, dataset.train.images.shape
    active = {n: w for stage in config_lib.stages(config) for n, w in stage.loss.items() if w}
    others = len(labels) - int(np.bincount(labels).max())
    if "crd" in active and config.terms.crd.negatives > others:
        raise UserError(
            f"config.terms.crd.negatives is {config.terms.crd.negatives}, but {dataset.name} has "
            f"classes with only {others} training images of other classes"
        )
    if any(losses.TERMS[name].rotations for name in active) and height != width:
        raise UserError(f"the term sskd turns images and needs square ones, found {height}x{width}")
    if dataset.train.streamed and any(losses.TERMS[name].rotations for name in active):
        raise UserError("the term sskd crops each rotation by itself, which streamed images cannot")
    classes = len(dataset.class_names)
    network = models.create(config.teacher.name, classes) if config.teacher.name else None
    run = _build(config, pathlib.Path(), dataset, None)
    try:
        params = jax.eval_shape(lambda: _initial_state(run, network)).params
    except ValueError as error:  # a term says which shapes it cannot bring together
        raise UserError(str(error)) from error
    _with_masks(run, params)


def _initial_state(run: Run, teacher: nn.Module | None) -> TrainState:
    terms = {name: term for stage in run.stages for name, term in stage.terms.items()}
    train = run.dataset.train
    state = init_state(
        run.config.seed,
        run.network,
        run.heads,
        terms,
        teacher,
        run.config.weighting,
        train.images.shape[1:],
        len(train.labels),
    )
    return state.replace(key=jax.random.key(run.order_seed))


def _ensure_teacher(
    config: ConfigDict, workdir: pathlib.Path, dataset: Dataset, checksums: dict[str, str]
) -> dict[str, Any]:
    """Trains the teacher where it is missing or unfinished; the result of its run.

    A finished teacher that `config.teacher.workdir` names is taken as it is, however it was
    trained, on the same data; of an imported one the data is not known.
    """
    config_of_teacher = config_lib.teacher_config(config)
    with workdir_lib.locked(workdir):
        if config.teacher.workdir and (workdir / "result.json").exists():
            noted = json.loads((workdir / "config.json").read_text())["checksums"]
            if noted.get("data", checksums["data"]) != checksums["data"]:
                raise UserError(f"the teacher in {workdir} was trained on other data")
            return _finished(workdir)
        workdir_lib.claim(workdir, config_of_teacher, checksums)
        print(f"Teacher {config.teacher.name} in {workdir}", flush=True)
        return _train({workdir: config_of_teacher}, dataset, None)[0]


def _finished(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _build(
    config: ConfigDict, workdir: pathlib.Path, dataset: Dataset, teacher: Teacher | None
) -> Run:
    size = len(dataset.train.labels)
    steps_per_epoch = math.ceil(size / config.batch_size)
    axis_name = parallel.AXIS if config.sync_batch_norm else None
    classes = len(dataset.class_names)
    stages, first_step = [], 0
    for stage in config_lib.stages(config):
        of_run = {"axis_name": parallel.AXIS, "train_size": size, "epochs": stage.epochs}
        if teacher and stage.loss.get("kd_la", 0):
            mass = teacher.class_mass(config.terms.kd_la.prior_temperature)
            of_run["class_prior"] = tuple((mass / mass.sum()).tolist())
        if teacher and stage.loss.get("ofd", 0):
            of_run["preact_norms"] = teacher.preact_norms()
        terms = losses.create(stage.loss, config.terms, of_run)
        rate = optim.schedule(stage.optimizer, steps_per_epoch, stage.epochs)
        stages.append(Stage(stage, terms, rate, optim.sgd(stage.optimizer, rate), first_step))
        first_step += stage.epochs * steps_per_epoch
    sources = {k: v for stage in stages for t in stage.terms.values() for k, v in t.heads.items()}
    network = models.create(config.model.name, classes, axis_name)
    on_cpu = jax.default_backend() == "cpu"
    return Run(
        config=config,
        workdir=workdir,
        dataset=dataset,
        teacher=teacher,
        network=network,
        heads=Heads(classes, sources, network.clone() if "network" in sources.values() else None),
        stages=stages,
        steps_per_epoch=steps_per_epoch,
        steps_per_call=(
            config.teacher.look_ahead
            or config.steps_per_call
            or (1 if on_cpu or dataset.train.streamed else config.log_every_steps)
        ),
        order_seed=config.seeds[0] if config.share_order else config.seed,
    )


def _with_view_cache(run: Run, teacher: Teacher) -> Teacher:
    """A teacher that looks its answers up, where that is possible and wanted."""
    config = run.config
    taps = frozenset().union(*(step.teacher_taps(config, s.terms) for s in run.stages))
    rotated = any(term.rotations for s in run.stages for term in s.terms.values())
    reason = view_cache.reason_against(config, taps, rotated)
    if run.dataset.train.streamed:
        reason = "streamed images have more views than a run draws"
    if config.teacher.view_cache in ("all", "drawn") and reason:
        raise UserError(
            f"config.teacher.view_cache is {config.teacher.view_cache}, but {reason}; "
            "set it to auto"
        )
    if reason or config.teacher.view_cache == "off":
        return teacher
    cache = view_cache.load_or_build(
        config,
        teacher.workdir / "views",
        run.dataset,
        teacher.answer,
        teacher.inputs,
        {"teacher": teacher.checksum, "data": fingerprint(run.dataset)},
        max(stage.config.epochs for stage in run.stages),
        "embedding" in taps,
    )
    if cache is None:
        return teacher
    return dataclasses.replace(teacher, answer=view_cache.answer, inputs=cache)


def _with_masks(run: Run, params: Any) -> Run:
    """The run with what each of its stages trains."""
    stages = []
    for stage in run.stages:
        pretrained = stage.config.name == "first"
        frozen = [f"terms/{name}" for name in params["terms"] if name not in stage.terms] + [
            f"terms/{name}/{part}"
            for name, term in stage.terms.items()
            for part in ([] if pretrained else term.first_stage_params)
        ]
        terms = [f"terms/{name}" for name in stage.terms]
        mask = optim.trainable_mask(
            params, stage.config.trainable, run.network.head_modules, frozen, terms
        )
        stages.append(dataclasses.replace(stage, trainable=mask))
    return dataclasses.replace(run, stages=stages)


def _train(
    runs: Mapping[pathlib.Path, ConfigDict], dataset: Dataset, teacher: Teacher | None
) -> list[dict[str, Any]]:
    """Trains runs that differ in their seed and writes their results; finished ones are kept."""
    results = {workdir: _finished(workdir) for workdir in runs}
    for workdir, result in results.items():
        if result:
            print(f"Finished already: {workdir}", flush=True)
    left = {workdir: config for workdir, config in runs.items() if not results[workdir]}
    if left:
        with contextlib.ExitStack() as stack:
            members = _members(left, dataset, teacher, stack)
            loop = Loop(members, stack.enter_context(_signals()))
            loop.train()
            for member in members:
                results[member.run.workdir] = member.result()
    return list(results.values())


def _members(
    configs: Mapping[pathlib.Path, ConfigDict],
    dataset: Dataset,
    teacher: Teacher | None,
    stack: contextlib.ExitStack,
) -> list[Member]:
    """The runs where they were stopped, all at the same step, or at their beginning."""
    runs = [_build(config, workdir, dataset, teacher) for workdir, config in configs.items()]
    if teacher:
        teacher = _with_view_cache(runs[0], teacher)
    begun = []
    for run in runs:
        initial = _initial_state(run, teacher.network if teacher else None)
        run = dataclasses.replace(_with_masks(run, initial.params), teacher=teacher)
        overview = parameter_overview.get_parameter_overview(initial.params)
        writers.write_atomically(run.workdir / "parameters.txt", f"{overview}\n".encode())
        keep = run.config.checkpoint.keep
        workdir_lib.check_space(run.workdir, (keep + 2) * 3 * len(runs) * _bytes(initial))
        checkpoints = stack.enter_context(Checkpoints(run.workdir, keep))
        begun.append((run, initial, checkpoints))
    snapshots = _restore(begun)
    members, predict = [], evaluate.make_predict(runs[0].network.apply)
    for (run, initial, checkpoints), now in zip(begun, snapshots, strict=True):
        if now:
            print(f"Going on from step {_number(run, now)} of {run.workdir}", flush=True)
        else:
            state = parallel.replicate(run.stages[0].begin(initial))
            now = Snapshot(state, jax.tree.map(jnp.copy, state.network()), Position())
        member = Member(run, now, checkpoints, predict)
        members.append(stack.enter_context(contextlib.closing(member)))
    return members


def _restore(
    begun: Sequence[tuple[Run, TrainState, Checkpoints]],
) -> list[Snapshot | None]:
    """The newest snapshots of the runs that are of the same step; None: from the beginning."""
    common = set.intersection(*(set(checkpoints.steps()) for *_, checkpoints in begun))
    newest = None if len(begun) == 1 else max(common, default=-1)
    while True:
        snapshots = [
            checkpoints.restore(
                lambda position, run=run, initial=initial: run.stages[position.stage].begin(
                    initial
                ),
                newest,
            )
            for run, initial, checkpoints in begun
        ]
        numbers = [
            _number(run, now) if now else -1
            for (run, *_), now in zip(begun, snapshots, strict=True)
        ]
        if len(set(numbers)) == 1:
            return snapshots
        newest = min(numbers)  # one of them was damaged


def _number(run: Run, now: Snapshot) -> int:
    return run.stages[now.position.stage].first_step + now.position.step


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one acts as usual."""
    received: list[int] = []

    def handle(signum: int, _) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
