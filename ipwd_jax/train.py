"""Carry out a run, from its config to its result: checks, teacher, resumption, training."""

import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import data as data_lib
from ipwd_jax import evaluate, parallel, plan, signals, stages, teachers, view_cache, writers, xla
from ipwd_jax import pretrained as pretrained_lib
from ipwd_jax import teacher as teacher_lib
from ipwd_jax import workdir as workdir_lib
from ipwd_jax.assemble import Experiment, assemble
from ipwd_jax.checkpoint import Checkpoints, check_path, checksum
from ipwd_jax.data import Dataset
from ipwd_jax.errors import Interrupted, UserError
from ipwd_jax.image_checks import sees_strong_views
from ipwd_jax.loop import Loop
from ipwd_jax.models import check_input
from ipwd_jax.progress import Progress
from ipwd_jax.recorder import OnEpoch, Recorder
from ipwd_jax.run_scores import score_run
from ipwd_jax.seed_run import SeedRun
from ipwd_jax.teacher import Teacher
from ipwd_jax.validate import check_fit, validate


def run(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    dataset: Dataset | None = None,
    teacher_only: bool = False,
    on_epoch: OnEpoch | None = None,
    extend: bool = False,
) -> dict[str, Any]:
    """Train the student that `config` describes, after its teacher if that is missing.

    A run that was stopped resumes, and a finished one is not trained again. Within the context of
    `parallel.distributed`, all processes must call this with the same arguments.

    Args:
        config: config of the run, which starts from `ipwd_jax.config.default()`.
        workdir: folder of the run, created if missing. With `config.seeds`, each seed has a folder
            of its own, with `_seed0`, `_seed1`... appended, and the same result as if it ran alone.
        dataset: used instead of `config.data.name`, as `ipwd_jax.data.from_arrays` returns it.
        teacher_only: stop when the teacher is there.
        on_epoch: called after each epoch of the student with the metrics of its row of
            `metrics.csv`, and with its `seed`.
        extend: whether a run with fewer epochs that is in `workdir` may be trained further. Except
            for the time that it takes, the result is that of a run with `config.epochs` from the
            beginning. The results of the shorter run stay, under names that end in its epochs.

    Returns:
        What `result.json` holds: of the student's run, or of the teacher's; with `config.seeds`
        `{"name": ..., "seeds": [...]}` with that of each.

    Raises:
        UserError: something that the user can fix is wrong; the message says what.
        Interrupted: SIGINT or SIGTERM came; the run is saved.

    Examples:
        >>> config = ipwd_jax.load_config("configs/digits_ipwd.py", epochs=10)
        >>> result = ipwd_jax.run(config, "runs/digits")  # doctest: +SKIP
    """
    workdir = pathlib.Path(workdir).expanduser()
    experiment = _checked(config, dataset, teacher_only)
    dataset, checksums = experiment.dataset, _checksums(experiment, extend)
    runs = {} if teacher_only else of_each_seed(config, workdir)
    with contextlib.ExitStack() as locks:
        for folder in runs:
            locks.enter_context(workdir_lib.locked(folder))
        # An extended run is not touched before its teacher is known to be the same.
        _claim(runs, checksums, dataset, extend, check_only=extend)
        teacher = None
        of_data = {"data": checksums["data"]}  # all that a teacher depends on, beside its recipe
        teacher_workdir = _teacher_folder(experiment, workdir, runs, of_data)
        finished = bool(runs) and parallel.from_first(
            lambda: all(workdir_lib.is_finished(folder, config.epochs) for folder in runs)
        )
        if not finished:
            print(plan.describe(experiment, list(runs), teacher_workdir), flush=True)
        if teacher_workdir and (not finished or workdir_lib.has_network(teacher_workdir)):
            teacher_result = _ensure_teacher(config, teacher_workdir, dataset, of_data)
            if teacher_only:
                return teacher_result
            teacher = teacher_lib.load(config, teacher_workdir, dataset)
            checksums["teacher"] = teacher.checksum
        _claim(runs, checksums, dataset, extend)
        results = _train(config, runs, dataset, teacher, experiment.pretrained, on_epoch)
    return {"name": config.name, "seeds": results} if config.seeds else results[0]


def planned(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    dataset: Dataset | None = None,
    extend: bool = False,
) -> Iterator[str]:
    """Describe what `run` would do with the same arguments, and the time and space that it needs.

    Nothing is written. The time is that of a few steps, times their number, on this machine.

    Yields:
        The lines of the plan, and then those with the time and the memory of the device, for which
        programs are compiled.

    Raises:
        UserError: what `run` would refuse before it begins to train.
    """
    workdir = pathlib.Path(workdir).expanduser()
    experiment = _checked(config, dataset)
    checksums = _checksums(experiment, extend)
    runs = of_each_seed(config, workdir)
    _claim(runs, checksums, experiment.dataset, extend, check_only=True)
    teacher_workdir = _teacher_folder(experiment, workdir, runs, {"data": checksums["data"]})
    megabytes = len(runs) * plan.disk(experiment) / 2**20
    text = plan.describe(experiment, list(runs), teacher_workdir, costs=True)
    yield f"{text}\ndisk     {megabytes:,.0f} MiB at most, without the teacher and its answers"
    yield plan.costs(experiment, len(runs), teacher_workdir)


def _checked(config: ConfigDict, dataset: Dataset | None, teacher_only: bool = False) -> Experiment:
    """Return the experiment, still without its teacher, after all checks that need no training."""
    validate(config)
    xla.check_deterministic(config.deterministic)
    teacher_lib.check_named(config, teacher_only)
    if teacher_only and not config.teacher.name:
        raise UserError("this config has no teacher; set --config.teacher.name to a network")
    dataset = _load(config) if dataset is None else data_lib.given(dataset, config.data)
    data_lib.check_augmentation(dataset, config)
    data_lib.check_queues(dataset, config, crops=1 + sees_strong_views(config))
    check_fit(config, dataset)
    experiment = assemble(config, dataset, None, pretrained_lib.load(config, dataset))
    stages.check_trained(experiment.stages)
    view_cache.check(experiment)
    return experiment


def _teacher_folder(
    experiment: Experiment,
    workdir: pathlib.Path,
    runs: Iterable[pathlib.Path],
    of_data: Mapping[str, str],
) -> pathlib.Path | None:
    """Return the folder of the teacher's run, after checks of it and of the runs' folders."""
    config, name = experiment.config, experiment.dataset.name
    found = teacher_lib.find_workdir(config, workdir, name, of_data)
    for folder in (*runs, *([found] if found else [])):
        check_path(folder)
    if found and found.resolve() in [folder.resolve() for folder in runs]:
        raise UserError(f"{found} would hold both student and teacher; choose another --workdir")
    if found and not config.teacher.pretrained:
        workdir_lib.check_begun_with(found, runs, config.epochs)
    return found


def _checksums(experiment: Experiment, extend: bool) -> dict[str, str]:
    """Return the checksums of the inputs of a run, after the checks that need them."""
    checksums = {"data": data_lib.fingerprint(experiment.dataset)}
    teacher_lib.check_data(experiment.config, checksums["data"])
    teacher_lib.check_network(experiment.config, experiment.dataset)
    if extend:
        _check_extension(experiment)
    if experiment.pretrained is not None:
        checksums["pretrained"] = checksum(experiment.pretrained)
    return checksums


def _load(config: ConfigDict) -> Dataset:
    if config.data.download and parallel.process_count() > 1:  # not by all of them at a time
        parallel.from_first(lambda: bool(data_lib.load(config.data)))
    return data_lib.load(config.data)


def _check_extension(experiment: Experiment) -> None:
    """Raise `UserError` if more epochs would have changed the epochs that a run has finished."""
    stage, schedule = experiment.stages[-1], experiment.config.optimizer.schedule
    depending = [f"the loss term {x}" for x, term in stage.terms.items() if hasattr(term, "epochs")]
    depending += [f"config.optimizer.schedule={schedule}"] if schedule != "step" else []
    if depending:
        raise UserError(
            f"{depending[0]} depends on the number of epochs, so the run cannot be extended; start "
            "a new one with --config.model.pretrained=FOLDER instead"
        )


def of_each_seed(config: ConfigDict, workdir: pathlib.Path) -> dict[pathlib.Path, ConfigDict]:
    """Return, by work directory, the config of each seed's run as if it were trained alone."""
    if not config.seeds:
        return {workdir: config}
    if workdir.name in ("", ".."):
        raise UserError(f"--workdir={workdir} has no name to add _seed0 to; choose one with a name")
    runs = {}
    for seed in config.seeds:
        own = config.copy_and_resolve_references()
        own.seed = int(seed)
        runs[workdir.with_name(f"{workdir.name}_seed{seed}")] = own
    return runs


def _claim(
    runs: Mapping[pathlib.Path, ConfigDict],
    checksums: Mapping[str, str],
    dataset: Dataset,
    extend: bool,
    check_only: bool = False,
) -> None:
    """Record in each folder which run it belongs to, once all are known to fit."""

    def claim() -> None:
        for workdir, config in runs.items():
            workdir_lib.check(workdir, config, checksums, extend)
        if check_only:
            return
        for workdir, config in runs.items():
            workdir_lib.claim(workdir, config, checksums, dataset.description(), extend)

    parallel.from_first(claim)


def evaluate_run(
    config: ConfigDict, workdir: str | pathlib.Path, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run on the test set of `config.data`.

    Args:
        config: names the network and the data, which may be another split than in training, with
            the same classes. The images are normalised as in training.
        workdir: of the run, as given to `run`.
        dataset: in place of `config.data.name`.

    Returns:
        Metrics of the `last` and of the `best` epoch of the main stage, also written to
        `eval.json`; with `config.seeds` `{"name": ..., "seeds": [...]}` with those of each.

    Raises:
        UserError: the checkpoint is missing, unreadable or of another network, or the data has
            other classes.

    Examples:
        >>> config = ipwd_jax.load_config("configs/digits_ipwd.py", epochs=10)
        >>> result = ipwd_jax.evaluate_run(config, "runs/digits")  # doctest: +SKIP
    """
    validate(config)
    dataset = _load(config) if dataset is None else data_lib.check_type(dataset)
    check_input(config.model.name, *dataset.train.images.shape[1:3])
    runs = of_each_seed(config, pathlib.Path(workdir).expanduser())
    results = [score_run(own, folder, dataset) for folder, own in runs.items()]
    return {"name": config.name, "seeds": results} if config.seeds else results[0]


def _ensure_teacher(
    config: ConfigDict, workdir: pathlib.Path, dataset: Dataset, checksums: dict[str, str]
) -> dict[str, Any]:
    """Return the result of the teacher's run, which is trained first unless it is finished.

    A finished teacher that `config.teacher` names by `workdir` or `pretrained` is taken as it is,
    however it was trained.
    """
    config_of_teacher = config_lib.teacher_config(config)
    if pretrained := config.teacher.pretrained:
        parallel.from_first(lambda: teachers.ensure(pretrained, config.teacher.name, workdir))
    runs = {workdir: config_of_teacher}

    def finished() -> dict[str, Any] | None:
        if pretrained or (config.teacher.workdir and (workdir / "result.json").exists()):
            return _result(workdir)
        if workdir_lib.holds(workdir, config_of_teacher, checksums):
            return _result(workdir)
        return None

    if (result := parallel.from_first(finished)) is not None:
        return result  # without a lock, because the folder may be read-only
    with workdir_lib.locked(workdir, wait=True):
        if (result := parallel.from_first(finished)) is not None:
            return result
        _claim(runs, checksums, dataset, extend=False)
        print(f"Teacher {config.teacher.name} in {workdir}", flush=True)
        return _train(config_of_teacher, runs, dataset, None)[0]


def _result(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "result.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it, and the same command writes it again "
            "from the checkpoint"
        ) from error


def _train(
    config: ConfigDict,
    runs: Mapping[pathlib.Path, ConfigDict],
    dataset: Dataset,
    teacher: Teacher | None,
    pretrained: Mapping[tuple[str, ...], np.ndarray] | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, Any]]:
    """Train runs that differ in their seeds and return their results; finished ones are kept."""

    def finished() -> dict[str, Any]:
        return {str(path): _result(path) for path in runs if (path / "result.json").exists()}

    results = {pathlib.Path(path): result for path, result in parallel.from_first(finished).items()}
    for workdir in results:
        print(f"Finished already: {workdir}", flush=True)
    left = {workdir: own.seed for workdir, own in runs.items() if workdir not in results}
    if left:
        experiment = assemble(config, dataset, teacher, pretrained)
        experiment = _with_view_cache(experiment, left)
        with contextlib.ExitStack() as stack:
            recorders = _recorders(experiment, left, stack, on_epoch)
            stack.enter_context(workdir_lib.failures_noted(left))
            stopped_by = stack.enter_context(signals.collected())
            _train_together(recorders, stopped_by)
            for recorder in recorders:
                results[recorder.run.workdir] = recorder.finish()
            if signum := parallel.largest(stopped_by[0] if stopped_by else 0):
                raise Interrupted(signum)  # it came too late to stop this run
    return [results[workdir] for workdir in runs]


def _recorders(
    experiment: Experiment,
    seeds: Mapping[pathlib.Path, int],
    stack: contextlib.ExitStack,
    on_epoch: OnEpoch | None,
) -> list[Recorder]:
    """Return a recorder of each seed's run, which resumes or is at its beginning."""
    keep = experiment.config.checkpoint.keep
    needed = plan.disk(experiment) * len(seeds)
    predict, recorders = evaluate.make_predict(experiment.network.apply), []
    progress = Progress(experiment.total_steps, unit="step")
    stack.callback(progress.close)
    parallel.from_first(functools.partial(workdir_lib.check_space, seeds.keys(), needed))
    for workdir, seed in seeds.items():
        checkpoints = stack.enter_context(Checkpoints(workdir, keep))
        run = SeedRun(experiment, seed, workdir, checkpoints, predict)
        overview = parameter_overview.get_parameter_overview(run.now.state.params)
        writers.write_atomically(workdir / "parameters.txt", f"{overview}\n".encode())
        if run.resumed:
            print(f"Resuming at step {run.number()} of {workdir}", flush=True)
        recorder = Recorder(run, progress, on_epoch)
        recorders.append(stack.enter_context(contextlib.closing(recorder)))
    return recorders


def _train_together(recorders: Sequence[Recorder], stopped_by: list[int]) -> None:
    """Train runs to their end in one program, after those that are behind have caught up."""
    for number, following in itertools.pairwise(sorted({r.run.number() for r in recorders})):
        behind = [recorder for recorder in recorders if recorder.run.number() <= number]
        seeds = ", ".join(str(recorder.run.seed) for recorder in behind)
        print(f"Seed {seeds} first catches up from step {number} to {following}", flush=True)
        Loop(behind, stopped_by).train(until=following)
    Loop(recorders, stopped_by).train()


def _with_view_cache(experiment: Experiment, seeds: Mapping[pathlib.Path, int]) -> Experiment:
    """Return the experiment with a teacher whose answers are cached, if possible and wanted.

    Runs that have begun keep to what they began with: an answer in the step may differ from one
    that was looked up in the last bit.
    """
    config, teacher = experiment.config, experiment.teacher
    if teacher is None:
        return experiment
    mode = config.teacher.view_cache
    reason = view_cache.reason_against(experiment)
    setting = "teacher.view_cache"
    chosen = parallel.from_first(lambda: [workdir_lib.chosen(path, setting) for path in seeds])
    begun = {*chosen} - {None}
    if mode == "auto" and len(begun) > 1:
        raise UserError(
            f"some of the seeds {tuple(config.seeds)} began with cached answers of the teacher and "
            "others without; finish them one by one with --config.seed, or choose for all with "
            "--config.teacher.view_cache"
        )
    cache = None
    if not (reason or mode == "off" or (mode == "auto" and begun == {"off"})):
        required = mode != "auto" or bool(begun)
        cache = view_cache.load_or_build(experiment, required, tuple(seeds.values()))
    for workdir in seeds:
        choice = workdir, setting, "cached" if cache else "off"
        parallel.from_first(functools.partial(workdir_lib.choose, *choice))
    return view_cache.with_cache(experiment, cache) if cache else experiment
