"""Write a web page about a run, or about how several runs compare.

  python -m ipwd_jax.report runs/digits_ipwd_resnet20_resnet8_seed0
  python -m ipwd_jax.report runs/mine_seed0 --baseline=runs/kd_seed0 --out=mine.html
  python -m ipwd_jax.report runs/digits_*_seed? --out=digits.html

The page is a single file that needs no network. A Markdown file is written beside it; with several
runs also the table of results in LaTeX and in CSV. A single run is reported in detail. Several runs
are compared: runs that differ only in their seed are averaged, and every method is compared with
plain knowledge distillation, or with the method of the baseline, over the seeds that both have.
"""

import argparse
import pathlib
from collections.abc import Sequence

from ipwd_jax import signals
from ipwd_jax.errors import warn
from ipwd_jax.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exits with status 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m ipwd_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE.html",
        help="default: report.html in the folder of a single run, or else in the current one",
    )
    parser.add_argument(
        "--baseline", type=pathlib.Path, metavar="RUN", help="folder of a run to compare with"
    )
    parser.add_argument(
        "--figures", action="store_true", help="write the figures as SVG files too, for Markdown"
    )
    given = parser.parse_args(argv)
    with signals.exit_statuses(resumes=False):
        out = given.out.expanduser() if given.out else None
        written = write_report(given.runs, out, given.baseline, given.figures)
        for problem in written.problems:
            warn(problem)
        print(f"Written to {', '.join(str(file) for file in written.files)}")


if __name__ == "__main__":
    main()
