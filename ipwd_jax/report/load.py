"""Read runs for a report, and check all of what the report relies on."""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ipwd_jax.config import teacher_config
from ipwd_jax.errors import UserError
from ipwd_jax.report.content import one_line
from ipwd_jax.runs import Run, load_run
from ipwd_jax.workdir import failure, holds, identity


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run whose records have been read and checked.

    Attributes:
        run: where it is, its settings and its result.
        checksums: of its data and its teacher, as far as they are noted.
        history: one row of metrics per epoch; may be empty for a finished run.
        finished: whether it has a result.
        classes: one row of numbers per class, by the names of `classes.csv`; empty if the run has
            not written it.
        problems: sentences about files that are missing or damaged.
    """

    run: Run
    checksums: dict[str, str]
    history: list[dict[str, Any]]
    finished: bool
    classes: list[dict[str, Any]]
    problems: tuple[str, ...]

    @property
    def student(self) -> str:
        """Name of the network that was trained."""
        return str(self.run.config.model.name)

    @property
    def teacher(self) -> str:
        """Name of the network that taught it; empty if none did."""
        return str(self.run.config.teacher.name)

    @property
    def taught_by(self) -> str:
        """Checksum of the teacher's parameters; empty if there is none or it is not noted."""
        return self.checksums.get("teacher", "")

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.run.config.seed)

    @property
    def epochs(self) -> int:
        """Number of epochs in all stages, of which a run may have trained fewer."""
        return int(self.run.config.epochs + self.run.config.first_stage.epochs)

    @property
    def data(self) -> str:
        """Name of the data set."""
        name = self.run.result.get("data") or self.run.data.get("name")
        return one_line(name or self.run.config.data.name, 60)

    @property
    def failure(self) -> str:
        """A further sentence on why the training failed; empty if it did not."""
        return _failure(self.run.workdir)

    @property
    def folder(self) -> str:
        """The work directory, for messages."""
        return one_line(self.run.workdir)

    def predictions(self) -> dict[str, np.ndarray]:
        """`last_logits` (N, C), `labels` (N,) and, if there is a teacher, `teacher_logits` (N, C).

        Raises:
            UserError: they are missing or damaged.
        """
        arrays = self.run.predictions()
        labels, logits = arrays.get("labels"), arrays.get("last_logits")
        path = self.run.workdir / "predictions.npz"
        if labels is None or logits is None:
            raise UserError(f"{path} lacks labels or last_logits; it has {sorted(arrays)}")
        for name in {"last_logits", "teacher_logits"} & arrays.keys():
            _check_logits(f"{name} of {path}", arrays[name], labels)
        return arrays

    def samples(self) -> dict[str, np.ndarray]:
        """`weight` (N,), `label` (N,) and `class_mass` (C,) of the training samples, and more.

        Raises:
            UserError: the run weights no samples, or the file is missing or damaged.
        """
        path = self.run.workdir / "samples.npz"
        if not path.exists():
            raise UserError(
                f"{self.folder} has no samples.npz, because it weights no samples or was trained "
                "by a version that did not write this file"
            )
        arrays = self.run.samples()
        missing = {"weight", "label", "class_mass"} - arrays.keys()
        if missing:
            raise UserError(f"{path} lacks {sorted(missing)}; it has {sorted(arrays)}")
        weight, label, mass = (arrays[name] for name in ("weight", "label", "class_mass"))
        fits = weight.ndim == mass.ndim == 1 and weight.shape == label.shape and weight.size
        if not (fits and np.isfinite(weight).all() and np.isfinite(mass).all()):
            raise UserError(
                f"{path} is damaged: weights, labels and class masses have the shapes "
                f"{weight.shape}, {label.shape} and {mass.shape}, or are not finite"
            )
        _check_labels(str(path), label, len(mass))
        return arrays

    def class_names(self, classes: int) -> list[str]:
        """The names of the classes on one line each; their numbers if the names are not noted."""
        names = self.run.data.get("class_names")
        if not isinstance(names, list) or len(names) != classes:
            names = list(range(classes))
        return [one_line(name, 24) for name in names]


def _failure(workdir: pathlib.Path) -> str:
    why = failure(workdir)
    return f" It failed: {one_line(why, 400)}" if why else ""


def load(workdir: pathlib.Path) -> Loaded:
    """Read a run and check it.

    Raises:
        UserError: the folder holds no run, or nothing of it can be reported.
    """
    run = load_run(workdir)
    _check_config(run)
    if isinstance(run.result, dict) and run.result.get("imported"):
        raise UserError(
            f"{workdir} holds an imported network, which was not trained here and so has no "
            "results to report"
        )
    history, problems = _history(run)
    classes, of_classes = _classes(run)
    if run.result:
        _check_result(run)
    elif not history:
        then = _failure(workdir) or " Run its command again to continue it."
        raise UserError(f"{workdir} holds a run that has not finished its first epoch.{then}")
    problems += of_classes
    checksums, finished = _checksums(workdir), bool(run.result)
    return Loaded(run, checksums, history, finished, classes, tuple(problems))


def load_all(workdirs: Sequence[pathlib.Path]) -> tuple[list[Loaded], list[str]]:
    """Read runs, and say in a sentence each which of them cannot be reported."""
    found: list[Loaded] = []
    problems: list[str] = []
    seen: set[pathlib.Path] = set()
    for workdir in workdirs:
        if workdir.resolve() in seen:
            problems.append(f"{one_line(workdir)} was given twice and counts once.")
            continue
        seen.add(workdir.resolve())
        try:
            loaded = load(workdir)
        except UserError as error:
            problems.append(f"{one_line(error, 600).rstrip('.')}.")
            continue
        found.append(loaded)
        problems += loaded.problems
    return found, problems


def without_teachers(runs: Sequence[Loaded]) -> tuple[list[Loaded], list[str]]:
    """Leave out the runs that trained the teacher of others, and say so in a sentence each."""
    if all(one.teacher for one in runs):
        return list(runs), []
    recipes = {}
    for one in runs:
        if one.teacher and not one.run.config.teacher.workdir:
            recipe = teacher_config(one.run.config)
            data = {"data": one.checksums.get("data", "")}
            recipes[identity(recipe, data), recipe.seed] = recipe, data
    found, said = [], []
    for one in runs:
        if any(
            one.run.config.name == recipe.name and holds(one.run.workdir, recipe, data)
            for recipe, data in recipes.values()
        ):
            said.append(f"{one.folder} is left out, because it is the teacher of other runs.")
        else:
            found.append(one)
    return found, said


def _check_config(run: Run) -> None:
    config = run.config
    try:
        int(config.seed), int(config.epochs), dict(config.loss), config.weighting.name
        str(config.name), config.model.name, config.teacher.name, config.data.name
        str(config.optimizer.schedule), str(config.first_stage.optimizer.schedule)
        teacher_config(config)
        known = isinstance(run.data, dict)
        float(sum(config.loss.values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.workdir / 'config.json'} is damaged: a setting is of another type: {error}"
        ) from error
    if not known:
        raise UserError(f"{run.workdir / 'config.json'} is damaged: 'data' is not a section")


def _check_result(run: Run) -> None:
    result = run.result
    scores = [result.get(name) for name in ("last", "best")] if isinstance(result, dict) else []
    teacher = result.get("teacher") if isinstance(result, dict) else None
    good = scores and all(map(_has_top1, scores))
    if not good or not (teacher is None or isinstance(teacher, dict)):
        raise UserError(
            f"{run.workdir / 'result.json'} is damaged or not of a training run: it lacks the "
            "top1 of the last and of the best epoch"
        )


def _has_top1(score: Any) -> bool:
    value = score.get("top1") if isinstance(score, dict) else None
    return isinstance(value, int | float) and math.isfinite(value)


def _history(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of metrics, and what is wrong with them; the rows after a damaged one are left."""
    path = run.workdir / "metrics.csv"
    try:
        rows = run.history
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return [], [f"{one_line(path)} cannot be read: {one_line(error)}."]
    good = [row for row in rows if isinstance(row.get("epoch"), float)]
    if not rows:
        return [], [f"{one_line(path)} is missing or empty, so there are no curves."]
    if len(good) < len(rows):
        lost = f"{len(rows) - len(good)} of {len(rows)} rows"
        return good, [f"{one_line(path)} is damaged: {lost} have no epoch and are left out."]
    return good, []


def _classes(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the classes, and what is wrong with them."""
    path = one_line(run.workdir / "classes.csv")
    try:
        rows = run.classes
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return [], [f"{path} cannot be read: {one_line(error)}."]
    names = run.data.get("class_names")
    if rows and isinstance(names, list) and len(rows) != len(names):
        return [], [f"{path} is damaged: it has {len(rows)} rows for {len(names)} classes."]
    if run.result and not rows:
        return [], [f"{path} is missing or empty, so the run is not in the tables of classes."]
    return rows, []


def _checksums(workdir: pathlib.Path) -> dict[str, str]:
    noted = json.loads((workdir / "config.json").read_text()).get("checksums")
    return {str(k): str(v) for k, v in noted.items()} if isinstance(noted, dict) else {}


def _check_logits(what: str, logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise UserError(f"{what} do not fit the labels: {logits.shape} and {labels.shape}")
    if not np.isfinite(logits).all():
        raise UserError(f"{what} are not finite")
    _check_labels(what, labels, logits.shape[1])


def _check_labels(what: str, labels: np.ndarray, classes: int) -> None:
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{what}: the labels must be integers from 0 to {classes - 1}")
