"""Reports of finished runs: the table that a run prints, and pages for people to read and share."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipwd_jax.report.summary import summary

if TYPE_CHECKING:
    from ipwd_jax.report.write import Written

__all__ = ["summary", "write_report"]


def write_report(
    runs: str | pathlib.Path | Sequence[str | pathlib.Path],
    out: str | pathlib.Path | None = None,
    baseline: str | pathlib.Path | None = None,
    figures: bool = False,
) -> "Written":
    """Write an HTML page about one run, or about how several runs compare, and files beside it.

    The page needs no other file and no network. Beside it is a Markdown file with the same text and
    tables; several runs also get their table of results in LaTeX and in CSV.

    Args:
        runs: the work directory of a run, or those of several.
        out: the page, whose name ends in `.html`. By default `report.html` in the work directory of
            a single run, and in the current directory for several.
        baseline: the work directory of a run to compare with. A single run is compared with it
            class by class. With several runs, its method takes the place of plain knowledge
            distillation in the paired differences.
        figures: whether to write the figures as SVG files too, into a folder beside the page, and
            to show them in the Markdown file.

    Returns:
        The files, and the problems that are named on the page: runs or parts of them that could not
        be reported.

    Raises:
        UserError: nothing can be reported, the baseline cannot be compared with, or the page cannot
            be written.

    Examples:
        >>> written = ipwd_jax.write_report(["runs/mine"])
        >>> [file.name for file in written.files]
        ['report.html', 'report.md']
    """
    # Matplotlib and SciPy's statistics take a second to import, and a training run needs neither.
    from ipwd_jax.report.write import write

    def path(name: str | pathlib.Path | None) -> pathlib.Path | None:
        return None if name is None else pathlib.Path(name).expanduser()

    runs = [runs] if isinstance(runs, str | pathlib.Path) else runs
    return write(
        [pathlib.Path(run).expanduser() for run in runs], path(out), path(baseline), figures
    )
