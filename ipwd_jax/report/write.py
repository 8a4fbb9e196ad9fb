"""Write a report: the page, and the files beside it."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from ipwd_jax.errors import UserError
from ipwd_jax.report import content, drawing, several, single
from ipwd_jax.report.content import Report
from ipwd_jax.report.load import Loaded, load, load_all, without_teachers
from ipwd_jax.writers import csv_text, write_atomically


@dataclasses.dataclass(frozen=True)
class Written:
    """What a report has written.

    Attributes:
        files: the page first, then those beside it.
        problems: sentences about what could not be reported, which stand on the page too.
    """

    files: tuple[pathlib.Path, ...]
    problems: tuple[str, ...]


def write(
    workdirs: Sequence[pathlib.Path],
    out: pathlib.Path | None = None,
    baseline: pathlib.Path | None = None,
    figures: bool = False,
) -> Written:
    """Write a report; see `ipwd_jax.report.write_report`."""
    if out is not None and out.suffix != ".html":
        raise UserError(f"the page must be called FILE.html, found --out={out}")
    if not workdirs:
        raise UserError("no run was given to report")
    compared = _baseline(baseline)
    runs, problems = load_all(workdirs)
    if compared:
        problems += [problem for problem in compared.problems if problem not in problems]
    runs, teachers = without_teachers(runs)
    problems += teachers
    finished = [one for one in runs if one.finished]
    if len(runs) > 1 and finished:
        problems += [_left_out(one) for one in runs if not one.finished]
    if len(finished) > 1:
        report = several.report(finished, compared, problems)
        out = out or pathlib.Path("report.html")
    else:
        one = _only(finished or runs, problems)
        report = single.report(one, compared, problems)
        out = out or one.run.workdir / "report.html"
    folder = f"{out.stem}_figures" if figures else ""
    files = {out: page(report), out.with_suffix(".md"): content.markdown(report, folder)}
    if report.results:
        files[out.with_suffix(".csv")] = csv_text(report.results)
        tables = [content.latex_table(table) for table in report.tables]
        files[out.with_suffix(".tex")] = "\n".join(["% needs the package booktabs", *tables])
    if figures:
        for name, figure in content.figures(report).items():
            files[out.parent / folder / name] = drawing.standalone(figure.svg)
    for path, text in files.items():
        write_atomically(path, text.encode())
    return Written(tuple(files), tuple(report.problems))


def page(report: Report) -> str:
    """The HTML page; everything but the figures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ipwd_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The figures are XML that Matplotlib has written, in which text is escaped.
    environment.filters["drawn"] = Markup
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    return environment.get_template("report.html").render(report=report, style=Markup(style))


def _baseline(workdir: pathlib.Path | None) -> Loaded | None:
    """The run to compare with; unlike other runs, it must be there."""
    if workdir is None:
        return None
    loaded = load(workdir)
    if not loaded.finished:
        raise UserError(
            f"the baseline {workdir} is not finished; run its command again to continue it"
        )
    return loaded


def _left_out(one: Loaded) -> str:
    return (
        f"{one.folder} is not finished and is left out: it has trained {len(one.history)} of "
        f"{one.epochs} epochs.{one.failure}"
    )


def _only(runs: Sequence[Loaded], problems: Sequence[str]) -> Loaded:
    """The one run to report in detail.

    Raises:
        UserError: there is none, or several are unfinished.
    """
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise UserError(f"nothing can be reported: {' '.join(problems)}")
    folders = ", ".join(one.folder for one in runs)
    raise UserError(f"none of these runs is finished: {folders}; report one of them alone")
