"""The report of several runs: their methods in a table, and the differences between these."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes

from ipwd_jax.config import default
from ipwd_jax.errors import UserError
from ipwd_jax.report import drawing, gap, published
from ipwd_jax.report.content import Figure, Report, Section, Table, one_line, short
from ipwd_jax.report.drawing import COLOURS, INK, draw
from ipwd_jax.report.load import Loaded
from ipwd_jax.report.methods import (
    NOT_MEASURED,
    Difference,
    Group,
    Pair,
    about_best,
    changes,
    difference,
    group,
    in_every_pair,
    interval,
    reference,
    signed,
)

_EPOCHS = ("last", "best")
# Ends of the keys of the sections whose tables are also written in LaTeX.
_TABLES = ("-table", "-published", "-differences")
# Settings with which a run does not train on all of its data set, as published runs do.
_PARTS_OF_DATA = ("long_tail", "validation_fraction")


def report(runs: Sequence[Loaded], baseline: Loaded | None, problems: list[str]) -> Report:
    """The report of several finished runs.

    Args:
        runs: the runs, of which `baseline` may be one.
        baseline: a run whose method the others are compared with.
        problems: of other runs that were asked for; more are added.

    Raises:
        UserError: the baseline's method cannot be told.
    """
    given = {one.run.workdir.resolve() for one in runs}
    outside = baseline is not None and baseline.run.workdir.resolve() not in given
    groups, notes = group([*runs, baseline] if baseline and outside else runs)
    to = reference(groups, baseline)
    if baseline and to is None:
        raise UserError(
            f"the baseline {baseline.folder} repeats another run; pass that run as --baseline"
        )
    notes = [*problems, *notes, *_of_different_data(groups), *_of_different_teachers(groups)]
    groups = sorted(groups, key=lambda one: one.method != to)
    cells = in_every_pair(groups)
    notes += _without_reference(cells, to)
    sections = []
    for number, data in enumerate(dict.fromkeys(one.pair.data for one in groups)):
        those = [one for one in cells if one.pair.data == data]
        sections += _of_data(f"data{number}", data, those, to)
    sections.append(_all_runs(groups))
    tables = [t for s in sections for t in s.tables if s.key.endswith(_TABLES)]
    methods = dict.fromkeys(one.method for one in groups)
    datasets = dict.fromkeys(one.pair.data for one in groups)
    count = sum(len(one.runs) for one in groups)
    return Report(
        title=f"{len(methods)} {'methods' if len(methods) > 1 else 'method'} on "
        + ", ".join(datasets),
        subtitle=f"Test accuracy of {count} runs: {', '.join(methods)}.",
        headlines=_headlines(cells),
        problems=notes,
        sections=sections,
        results=_records(cells, to),
        tables=tables,
    )


def _of_different_data(groups: Sequence[Group]) -> list[str]:
    datasets: dict[str, list[str]] = {}
    for one in groups:
        datasets.setdefault(one.pair.data, []).extend(r.folder for r in one.runs.values())
    if len(datasets) == 1:
        return []
    listed = "; ".join(f"{data}: {', '.join(folders)}" for data, folders in datasets.items())
    return [f"The runs are of different data, and each is compared with its own alone. {listed}."]


def _of_different_teachers(groups: Sequence[Group]) -> list[str]:
    """Sentences about pairs in which runs of one seed had teachers with different parameters."""
    found: dict[tuple[Pair, int], dict[str, list[str]]] = {}
    for one in groups:
        for seed, run in one.runs.items():
            if run.taught_by:
                by_teacher = found.setdefault((one.pair, seed), {})
                by_teacher.setdefault(run.taught_by, []).append(run.folder)
    pairs: dict[Pair, dict[str, list[str]]] = {}
    for (pair, _), by_teacher in found.items():
        if len(by_teacher) > 1:
            pairs.setdefault(pair, by_teacher)
    return [
        f"{pair}: the teachers have different parameters, so that methods are compared that did "
        "not have the same teacher, and the groups of classes leave some of them out: "
        + "; ".join(f"{checksum}: {', '.join(runs)}" for checksum, runs in by_teacher.items())
        + "."
        for pair, by_teacher in pairs.items()
    ]


def _without_reference(groups: Sequence[Group], to: str | None) -> list[str]:
    if to is None:
        return [
            "No method, or more than one, is plain knowledge distillation (terms ce and kd without "
            "weights), so no differences are shown; name a run to compare with, using --baseline."
        ]
    here = {one.pair for one in groups if one.method == to}
    lacking = dict.fromkeys(str(one.pair) for one in groups if one.pair not in here)
    return [f"{pair} has no run of {to} to compare with." for pair in lacking]


def _headlines(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """The method with the best mean of the last epoch in each pair, for up to four pairs."""
    best: dict[Pair, Group] = {}
    for one in groups:
        if one.pair not in best or _mean(one, "last") > _mean(best[one.pair], "last"):
            best[one.pair] = one
    several = len({pair.data for pair in best}) > 1
    return [
        (
            f"{pair}{f' on {pair.data}' if several else ''}, highest mean (%) at the last epoch: "
            f"{one.method}",
            _accuracy(one, "last"),
        )
        for pair, one in list(best.items())[:4]
    ]


def _mean(one: Group, epoch: str) -> float:
    return statistics.fmean(one.values(epoch).values())


def _of_data(key: str, data: str, groups: Sequence[Group], to: str | None) -> list[Section]:
    """The sections about the runs of one data set."""
    pairs = list(dict.fromkeys(one.pair for one in groups))
    found = about_best([o.run.result for one in groups for o in one.runs.values()])
    text = [f"Mean and sample standard deviation over n seeds. {found}."]
    results = [_results(data, groups, pairs, epoch) for epoch in _EPOCHS]
    sections = [Section(f"{key}-table", f"Accuracy on {data}", text, tables=results)]
    if published_numbers := _published(key, data, groups, pairs):
        sections.append(published_numbers)
    others = [one for one in groups if one.method != to]
    if to is not None and others:
        sections.append(_differences(key, data, groups, pairs, to))
    if to is not None and (gains := gap.by_mass(f"{key}-groups", data, groups, pairs, to)):
        sections.append(gains)
    if weights := gap.weights(f"{key}-weights", data, groups, pairs):
        sections.append(weights)
    drawn = [one for one in groups if one.curves("test_top1").size]
    figures = [
        _curves(f"{key}-curves{number}", pair, those)
        for number, pair in enumerate(pairs)
        if (those := [one for one in drawn if one.pair == pair])
    ]
    sections.append(Section(f"{key}-training", f"Training on {data}", figures=figures))
    sections.append(_settings(key, data, groups, pairs, to))
    return sections


def _cell(groups: Sequence[Group], method: str, pair: Pair) -> Group | None:
    return next((one for one in groups if (one.method, one.pair) == (method, pair)), None)


def _results(data: str, groups: Sequence[Group], pairs: Sequence[Pair], epoch: str) -> Table:
    """Methods in rows and pairs in columns; the first row is the teacher."""
    rows = []
    teachers = [_teacher(groups, pair) for pair in pairs]
    if any(score != NOT_MEASURED for score in teachers):
        rows.append(["teacher", *teachers])
    for method in dict.fromkeys(one.method for one in groups):
        cells = [_cell(groups, method, pair) for pair in pairs]
        rows.append([method, *(_accuracy(cell, epoch) for cell in cells)])
    caption = f"Top-1 accuracy (%) on the test set of {data}, {epoch} epoch"
    return Table(caption, ["method", *map(str, pairs)], rows)


def _published(
    key: str, data: str, groups: Sequence[Group], pairs: Sequence[Pair]
) -> Section | None:
    """Published numbers beside our means; None if there are none for these methods and pairs."""
    names = {run.run.result.get("data") for one in groups for run in one.runs.values()}
    whole = not any(one.config.data[k] for one in groups for k in _PARTS_OF_DATA)
    # A folder of other images can have the name of a data set.
    alike = len(names) == 1 and names == {one.config.data.name for one in groups}
    known = published.of_data(names.pop() or "") if alike and whole else {}
    rows, sources = [], {}
    for method in dict.fromkeys(one.method for one in groups):
        entry = known.get(method, {"top1": {}})
        cells = []
        for pair in pairs:
            theirs, ours = entry["top1"].get(str(pair)), _cell(groups, method, pair)
            if theirs is None or ours is None:
                cells.append(NOT_MEASURED)
            else:
                cells.append(f"{theirs:.2f} ({signed(_mean(ours, 'last') - theirs)})")
        if any(cell != NOT_MEASURED for cell in cells):
            rows.append([method, *cells])
            sources[method] = entry["source"]
    if not rows:
        return None
    listed = "; ".join(f"{method}: {source}" for method, source in sources.items())
    text = [
        "In brackets: our mean at the last epoch minus the published number. Published numbers are "
        "of 240 epochs or more and of teachers of other runs, and those of the best epoch are too "
        f"high for a comparison with a last epoch. Sources: {listed}."
    ]
    table = Table(f"Published top-1 accuracy (%) on {data}", ["method", *map(str, pairs)], rows)
    return Section(f"{key}-published", f"Published numbers on {data}", text, tables=[table])


def _teacher(groups: Sequence[Group], pair: Pair) -> str:
    """The teacher's accuracy; a range if the runs had teachers of different accuracy."""
    scores = [
        (one.run.result.get("teacher") or {}).get("top1")
        for cell in groups
        if cell.pair == pair
        for one in cell.runs.values()
    ]
    known = [score for score in scores if isinstance(score, float)]
    if not known:
        return NOT_MEASURED
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    return low if low == high else f"{low} to {high}"


def _accuracy(cell: Group | None, epoch: str) -> str:
    if cell is None:
        return NOT_MEASURED
    values = list(cell.values(epoch).values())
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation} (n={len(values)})"


def _differences(
    key: str, data: str, groups: Sequence[Group], pairs: Sequence[Pair], to: str
) -> Section:
    tables, figures = [], []
    methods = [m for m in dict.fromkeys(one.method for one in groups) if m != to]
    for epoch in _EPOCHS:
        rows = []
        for method in methods:
            found = [_compared(groups, method, pair, to, epoch) for pair in pairs]
            if any(found):
                rows.append([method, *map(interval, found)])
        caption = f"Difference in top-1 accuracy (points) from {to} on {data}, {epoch} epoch"
        tables.append(Table(caption, ["method", *map(str, pairs)], rows))
    for number, pair in enumerate(pairs):
        compared = {m: _compared(groups, m, pair, to, "last") for m in methods}
        known = {method: found for method, found in compared.items() if found}
        if known:
            figures.append(_forest(f"{key}-forest{number}", pair, known, to))
    text = [
        f"Differences are taken between the runs of a method and of {to} with the same seed, and "
        "averaged over the seeds that both have. Brackets hold the 95 % confidence interval by "
        "Student's t distribution; one seed has none. An interval that contains 0 does not show "
        "which method is better."
    ]
    return Section(
        f"{key}-differences", f"Differences from {to} on {data}", text, figures, (), tables
    )


def _compared(
    groups: Sequence[Group], method: str, pair: Pair, to: str, epoch: str
) -> Difference | None:
    ours, theirs = _cell(groups, method, pair), _cell(groups, to, pair)
    return difference(ours.values(epoch), theirs.values(epoch)) if ours and theirs else None


def _forest(key: str, pair: Pair, compared: dict[str, Difference], to: str) -> Figure:
    """Differences and their intervals as dots and bars."""

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=INK, linewidth=0.9)
        for row, found in enumerate(compared.values()):
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=COLOURS[0], linewidth=2)
            inside = COLOURS[0] if found.n > 1 else "none"
            axes.plot([found.mean], [row], "o", color=COLOURS[0], mfc=inside, markersize=6)
        axes.set_yticks(range(len(compared)), [short(name) for name in compared])
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"difference from {short(to)} (points)", title=str(pair))

    words = "; ".join(f"{name} {interval(found)}" for name, found in compared.items())
    alt = f"{pair}, last epoch, difference from {to} in points: {words}."
    caption = f"{pair}: mean differences from {to} at the last epoch with their 95 % "
    caption += "intervals. An open circle is a single seed, which has no interval."
    return Figure(draw(key, alt, paint, max(1.6, 1.0 + 0.35 * len(compared))), alt, caption)


def _curves(key: str, pair: Pair, groups: Sequence[Group]) -> Figure:
    """Test accuracy over the epochs: the mean of each method, and the range of its seeds."""
    shown = [(short(one.method), one.curves("test_top1")) for one in groups]
    rows = -(-len(shown) // 2)

    def paint(axes: Axes) -> None:
        drawing.means_and_ranges(axes, shown)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=str(pair))
        drawing.legend_below(axes, 2)

    words = "; ".join(f"{one.method} {_accuracy(one, 'last')}" for one in groups)
    alt = f"{pair}: test accuracy over the epochs; at the last one: {words}."
    caption = f"{pair}: mean test accuracy after each epoch; the shaded band spans the seeds."
    return Figure(draw(key, alt, paint, 3.0 + 0.22 * rows), alt, caption)


def _settings(
    key: str, data: str, groups: Sequence[Group], pairs: Sequence[Pair], to: str | None
) -> Section:
    """Return a section with the settings in which each method differs from the reference."""
    rows = []
    for pair in pairs:
        cells = [one for one in groups if one.pair == pair]
        first = next((one for one in cells if one.method == to), cells[0])
        for one in cells:
            differing = changes(one.config, first.config)
            words = ", ".join(differing) if one is not first else "compared with"
            rows.append([one.method, str(pair), words or "the same"])
    caption = "Settings other than those of the method compared with"
    table = Table(caption, ["method", "pair", "settings"], rows, words=True)
    of_all = [dict.fromkeys(changes(one.config, default())) for one in groups]
    common = [change for change in of_all[0] if all(change in these for these in of_all)]
    text = [f"Settings that differ from the defaults in all runs: {', '.join(common)}."]
    title = f"Settings on {data}"
    return Section(f"{key}-settings", title, text if common else [], tables=[table])


def _all_runs(groups: Sequence[Group]) -> Section:
    rows = []
    for one in groups:
        for seed, run in one.runs.items():
            result = run.run.result
            seconds = result.get("train_seconds")
            numbers = [f"{result[epoch]['top1']:.2f}" for epoch in _EPOCHS]
            time = f"{seconds:,.0f}" if isinstance(seconds, float) else NOT_MEASURED
            device = one_line(result.get("device", ""), 40)
            rows.append([one.method, str(one.pair), str(seed), *numbers, time, device, run.folder])
    head = ["method", "pair", "seed", "last (%)", "best (%)", "seconds", "device", "folder"]
    table = Table("The runs of this report", head, rows, words=True)
    return Section("runs", "All runs", tables=[table])


def _records(groups: Sequence[Group], to: str | None) -> list[dict[str, str | int | float]]:
    """One record per method, pair and epoch, in full precision, for a program."""
    records = []
    for one in groups:
        for epoch in _EPOCHS:
            values = list(one.values(epoch).values())
            found = None
            if to is not None and one.method != to:
                found = _compared(groups, one.method, one.pair, to, epoch)
            record: dict[str, str | int | float | None] = {
                "data": one.pair.data,
                "teacher": one.pair.teacher,
                "student": one.pair.student,
                "method": one.method,
                "epoch": epoch,
                "n": len(values),
                "mean_top1": statistics.fmean(values),
                "deviation_top1": statistics.stdev(values) if len(values) > 1 else None,
                "compared_with": to if found else None,
                "common_seeds": found.n if found else None,
                "difference": found.mean if found else None,
                "difference_low": found.low if found else None,
                "difference_high": found.high if found else None,
            }
            records.append({k: "" if v is None else v for k, v in record.items()})
    return records
