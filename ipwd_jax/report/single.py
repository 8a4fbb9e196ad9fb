"""The report of a single run."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipwd_jax import metrics
from ipwd_jax.config import default
from ipwd_jax.errors import UserError
from ipwd_jax.report import analysis, curves, methods, pictures
from ipwd_jax.report.content import Report, Section, Table, one_line
from ipwd_jax.report.load import Loaded

# Metric -> its name and unit in the table of results, in the order of the table.
_METRICS = {
    "top1": "top-1 accuracy (%)",
    "top5": "top-5 accuracy (%)",
    "nll": "cross-entropy (nats)",
    "brier": "Brier score (0 to 2)",
    "ece": "expected calibration error, ECE (%)",
    "aurc": "area under the risk-coverage curve, AURC (x1000)",
    "eaurc": "its excess over the best order, E-AURC (x1000)",
    "recall_group1": "recall of the classes that the teacher favours most (%)",
    "recall_group2": "recall of the second group (%)",
    "recall_group3": "recall of the third group (%)",
    "recall_group4": "recall of the classes that it favours least (%)",
    "validation_top1": "top-1 accuracy on the validation images (%)",
}

# Makes a section from the run, its baseline, the section's key and its title.
_Make = Callable[[Loaded, Loaded | None, str, str], Section]


def report(loaded: Loaded, baseline: Loaded | None, problems: list[str]) -> Report:
    """The report of a run, or of the beginning of a run that is not finished.

    Args:
        loaded: the run.
        baseline: a finished run to compare it with class by class.
        problems: of other runs that were asked for; those of this one are added.

    Raises:
        UserError: the baseline is of another test set.
    """
    if baseline and loaded.finished:
        _check_same_test(loaded, baseline)
    if not loaded.finished:
        problems = [*problems, _unfinished(loaded)]
    if baseline and not loaded.finished:
        problems = [*problems, f"{loaded.folder} cannot be compared with a baseline yet."]
    sections, missing = [], []
    for key, title, make in _parts(loaded, baseline):
        try:
            sections.append(make(loaded, baseline, key, title))
        except UserError as error:
            sections.append(Section(key, title, missing=f"{one_line(error, 400)}."))
            missing.append(f"{title}: {one_line(error, 400)}.")
    return Report(
        title=one_line(loaded.run.config.name or loaded.run.workdir.name, 80),
        subtitle=_subtitle(loaded, baseline),
        headlines=_headlines(loaded),
        problems=[*problems, *missing],
        sections=sections,
    )


def _parts(loaded: Loaded, baseline: Loaded | None) -> list[tuple[str, str, _Make]]:
    """Key, title and maker of each section that such a run has."""
    if not loaded.finished:
        return [("training", "Training", _training), ("facts", "The run", _facts)]
    parts: list[tuple[str, str, _Make]] = [
        ("results", "Results", _results),
        ("training", "Training", _training),
        ("confidence", "Confidence", _confidence),
        ("weights", "Weights of the samples", _weights),
    ]
    if (loaded.run.workdir / "samples.npz").exists():
        parts.append(("gap", "Transfer gap", _gap))
        parts.append(("images", "Images with extreme weights", _images))
    if baseline:
        parts.append(("gains", "Gain of each class over the baseline", _gains))
    if loaded.teacher:
        parts.append(("confusions", "Confusions unlike the teacher's", _confusions))
    return [*parts, ("facts", "The run", _facts)]


def _check_same_test(loaded: Loaded, baseline: Loaded) -> None:
    """Raise `UserError` unless both runs were measured on the same test set."""
    ours, theirs = loaded.checksums.get("data"), baseline.checksums.get("data")
    try:
        labels = [one.predictions()["labels"] for one in (loaded, baseline)]
        same = np.array_equal(labels[0], labels[1])
    except UserError:
        same = True  # the sections that need the labels say what is wrong with them
    if (ours and theirs and ours != theirs) or not same:
        raise UserError(
            f"the baseline {baseline.folder} was trained on {baseline.data} and {loaded.folder} on "
            f"{loaded.data}, or on another version of it; give a --baseline of the same data"
        )


def _unfinished(loaded: Loaded) -> str:
    return (
        f"{loaded.folder} is not finished: {len(loaded.history)} of {loaded.epochs} epochs are "
        "reported."
        f"{loaded.failure}"
    )


def _subtitle(loaded: Loaded, baseline: Loaded | None) -> str:
    taught = f", distilled from {loaded.teacher}" if loaded.teacher else ""
    compared = f", compared with {baseline.folder}" if baseline else ""
    return f"{loaded.student} on {loaded.data}{taught}, seed {loaded.seed}{compared}."


def _headlines(loaded: Loaded) -> list[tuple[str, str]]:
    result = loaded.run.result
    if not result:
        tops = analysis.column(loaded.history, "test_top1")
        tops = tops[np.isfinite(tops)]
        latest = [("latest test accuracy", f"{tops[-1]:.2f} %")] if len(tops) else []
        return [("epochs so far", str(len(loaded.history))), *latest]
    found = [
        (f"{which} epoch ({result[which].get('epoch', '?')})", f"{result[which]['top1']:.2f} %")
        for which in ("last", "best")
    ]
    teacher = (result.get("teacher") or {}).get("top1")
    if isinstance(teacher, float):
        found.append((f"teacher {loaded.teacher}", f"{teacher:.2f} %"))
    for name, label, unit in (("ece", "ECE", " %"), ("aurc", "AURC", "")):
        if isinstance(result["last"].get(name), float):
            found.append((label, f"{result['last'][name]:.2f}{unit}"))
    return found


def _results(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    result = loaded.run.result
    columns = {"last epoch": result["last"], "best epoch": result["best"]}
    if result.get("teacher"):
        columns["teacher"] = result["teacher"]
    if baseline:
        columns["baseline, last epoch"] = baseline.run.result["last"]
    rows = [
        [label, *(_number(scores.get(name)) for scores in columns.values())]
        for name, label in _METRICS.items()
        if any(name in scores for scores in columns.values())
    ]
    text = [f"{methods.about_best([result])}. All diagrams show the last epoch."]
    return Section(
        key, title, text, tables=[Table("Measured on the test set", ["metric", *columns], rows)]
    )


def _training(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    if not loaded.history:
        raise UserError(f"{loaded.folder} has no readable metrics.csv")
    teacher = (loaded.run.result.get("teacher") or {}).get("top1")
    marks = analysis.marks(loaded.history, _stepped(loaded))
    figures = [
        curves.accuracy(loaded.history, marks, teacher if isinstance(teacher, float) else None),
        curves.losses(loaded.history, marks),
    ]
    return Section(key, title, figures=figures)


def _stepped(loaded: Loaded) -> list[str]:
    """The stages whose learning rate falls in steps."""
    config = loaded.run.config
    optimizers = {"main": config.optimizer, "first": config.first_stage.optimizer}
    return [name for name, found in optimizers.items() if found.schedule == "step"]


def _confidence(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    arrays = loaded.predictions()
    labels = arrays["labels"]
    networks = {"student": analysis.confidence(arrays["last_logits"], labels)}
    if "teacher_logits" in arrays:
        networks["teacher"] = analysis.confidence(arrays["teacher_logits"], labels)
    if baseline:
        networks["baseline"] = analysis.confidence(baseline.predictions()["last_logits"], labels)
    figures = [curves.reliability(networks), curves.risk_coverage(networks)]
    return Section(key, title, figures=figures)


def _weights(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    weights = loaded.samples()["weight"]
    figures = []
    if np.isfinite(analysis.column(loaded.history, "weight_decile1")).any():
        marks = analysis.marks(loaded.history, _stepped(loaded))
        figures.append(curves.weight_bands(loaded.history, marks))
    figures.append(curves.weight_histogram(weights))
    share = metrics.weight_summary(weights)["effective_sample_size"] if weights.any() else 0.0
    text = [
        f"The weighting {one_line(loaded.run.config.weighting.name)} multiplies the loss of each "
        "training sample by a weight. The weights of the last epoch have an effective sample size "
        f"of {100 * share:.1f} % of the samples. Where this is small, few samples decide the loss."
    ]
    return Section(key, title, text, figures)


def _gap(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    samples = loaded.samples()
    weight, label, mass = samples["weight"], samples["label"], samples["class_mass"]
    means = metrics.class_means(weight, label, len(mass))
    if not np.isfinite(means).all():
        raise UserError("some classes have no training sample in samples.npz")
    if np.ptp(mass) == 0:
        raise UserError("the run has no teacher that favours some classes")
    rank = metrics.rank_correlation(means, mass)
    text = [
        "An inverse propensity gives large weights to the classes that the teacher gives little "
        "probability, so that the correlation is negative."
    ]
    figure = curves.transfer_gap(means, mass, loaded.class_names(len(mass)), rank)
    return Section(key, title, text, [figure])


def _gains(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    assert baseline is not None
    mass = _class_mass(loaded, baseline)
    ours, theirs = loaded.predictions(), baseline.predictions()
    if not len(mass) == ours["last_logits"].shape[1] == theirs["last_logits"].shape[1]:
        raise UserError("the runs and their teacher's class masses differ in the number of classes")
    labels = ours["labels"]
    recalls = [metrics.class_recall(x["last_logits"], labels) for x in (theirs, ours)]
    gains = recalls[1] - recalls[0]
    groups = metrics.groups_by_mass(mass)
    names = loaded.class_names(len(mass))
    rows = []
    before, after = (metrics.group_means(recall, mass) for recall in recalls)
    for number, group in enumerate(groups):
        shown = ", ".join(names[label] for label in group[:8]) + (", …" if len(group) > 8 else "")
        numbers = (before[number], after[number], after[number] - before[number])
        rows.append([f"{number + 1}: {shown}", *map(_number, numbers[:2]), _signed(numbers[2])])
    head = ["group and its classes", "baseline (%)", "this run (%)", "gain (points)"]
    table = Table("Mean recall of the classes of each group", head, rows)
    text = [
        "The classes are ranked by the teacher's mass, most favoured first, and cut into four "
        "groups of equal size. A method that closes the transfer gap gains most in the last group."
    ]
    return Section(key, title, text, [curves.class_gains(gains, groups, names)], tables=[table])


def _class_mass(loaded: Loaded, baseline: Loaded) -> np.ndarray:
    """The teacher's class mass, from whichever of two runs of the same teacher has noted it."""
    same = loaded.checksums.get("teacher") == baseline.checksums.get("teacher")
    for one in (loaded, baseline) if same else (loaded,):
        if (one.run.workdir / "samples.npz").exists():
            return one.samples()["class_mass"]
    raise UserError(
        f"{loaded.folder} has no samples.npz, which notes how much the teacher favours each class"
        + (", and the baseline has none either" if same else "; the baseline had another teacher")
    )


def _images(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    samples = loaded.samples()
    galleries = pictures.extremes(loaded, samples["weight"], samples["label"])
    return Section(key, title, galleries=galleries)


def _confusions(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    arrays = loaded.predictions()
    if "teacher_logits" not in arrays:
        raise UserError(f"predictions.npz of {loaded.folder} lacks the teacher's logits")
    logits = arrays["last_logits"]
    if arrays["teacher_logits"].shape != logits.shape:
        raise UserError("the teacher's logits and the student's have different shapes")
    found = analysis.confusions(logits, arrays["teacher_logits"], arrays["labels"])
    names = loaded.class_names(logits.shape[1])
    rows = [[f"{names[a]} → {names[b]}", str(s), str(t), f"{s - t:+d}"] for a, b, s, t in found]
    if not rows:
        return Section(key, title, ["The student confuses the same classes as its teacher."])
    head = ["true class → answer", "student", "teacher", "difference"]
    caption = "Test images of the first class for which the answer was the second"
    return Section(key, title, tables=[Table(caption, head, rows)])


def _facts(loaded: Loaded, baseline: Loaded | None, key: str, title: str) -> Section:
    result = loaded.run.result
    seconds, speed = result.get("train_seconds"), result.get("images_per_second")
    parameters = result.get("parameters")
    facts = {
        "folder": loaded.folder,
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else "",
        "device": f"{result.get('devices', 1)} x {result['device']}"
        if result.get("device")
        else "",
        "precision": result.get("precision", ""),
        "training time": f"{seconds:,.0f} s" if isinstance(seconds, float) else "",
        "speed": f"{speed:,.0f} training images/s" if isinstance(speed, float) else "",
        "XLA flags": result.get("xla_flags", ""),
    }
    versions = result.get("versions")
    if isinstance(versions, Mapping):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts |= {f"checksum of the {name}": value for name, value in loaded.checksums.items()}
    rows = [[name, one_line(value, 400)] for name, value in facts.items() if value]
    tables = [Table("Facts", ["fact", "value"], rows, words=True)]
    if changed := _changed(loaded):
        caption = "Settings that differ from the defaults"
        tables.append(Table(caption, ["setting", "here", "default"], changed, words=True))
    return Section(key, title, tables=tables)


def _changed(loaded: Loaded) -> list[list[str]]:
    """Setting, value and default of all settings that are not at their default."""
    here, usual = (
        {path: json.dumps(value, default=str) for path, value in methods.leaves(config).items()}
        for config in (loaded.run.config, default())
    )
    return [
        [one_line(cell, 120) for cell in (path, value, usual.get(path, "(no such setting)"))]
        for path, value in sorted(here.items())
        if value != usual.get(path)
    ]


def _number(value: Any) -> str:
    """A measured number with three digits; empty if it was not measured."""
    if value is None:
        return ""
    return f"{value:.3f}" if np.isfinite(value) else "undefined"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if np.isfinite(value) else "undefined"
