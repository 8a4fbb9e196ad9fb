"""Train many runs, one after the other, and compare their results.

  python -m ipwd_jax.sweep --config=configs/sweeps/digits.py --dry_run
  python -m ipwd_jax.sweep --config=configs/sweeps/digits.py --out=runs/digits --minutes=30
  python -m ipwd_jax.sweep --config=configs/sweeps/paper_cifar100.py --index=2 --count=8

The file has a function `get_runs()`, which returns a list of mappings. In each of them, "config" is
the config of a run, whose name is that of its folder, and "seeds" are the seeds that it is trained
with, one after the other; they can be left out. If the config itself has several `seeds`, they are
trained in one program. What follows a colon after the file is the argument of `get_runs`.

The same command resumes a sweep that was stopped: finished runs are skipped, and unfinished ones
are resumed. Several processes, on several machines too, can work on one folder at the same time.
The exit status is 1 if a run could not be trained, and otherwise 0, even if there was not enough
time for all runs; wrong flags give 2, and a signal gives 128 plus its number.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import logging as python_logging
import math
import pathlib
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from ipwd_jax import parallel, signals, train, xla
from ipwd_jax import workdir as workdir_lib
from ipwd_jax.api import load_module
from ipwd_jax.errors import Interrupted, InUse, UserError
from ipwd_jax.report.summary import mean_and_deviation
from ipwd_jax.runs import load_run
from ipwd_jax.validate import validate

# What can be said of a run, in the order of the summary.
FINISHED = "finished"
FAILED = "failed"
IN_USE = "in use by another process"
UNFINISHED = "unfinished"

_LONGEST_TIMER = 1e8  # seconds that every operating system accepts
_RING_AGAIN = 30.0  # seconds after which an interrupt that was lost is repeated


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a sweep: one call of `ipwd_jax.train.run`.

    Attributes:
        config: of the run.
        workdir: of the run; with `config.seeds`, the folder of each seed has this name and
            `_seed0`, `_seed1`...
    """

    config: ConfigDict
    workdir: pathlib.Path

    def folders(self) -> dict[pathlib.Path, ConfigDict]:
        """Return, by folder, the config of the run of each seed."""
        return train.of_each_seed(self.config, self.workdir)

    def state(self) -> str:
        """Return `FINISHED` if all seeds have been trained with this config, else `UNFINISHED`."""
        ended = (workdir_lib.holds(folder, own, {}) for folder, own in self.folders().items())
        return FINISHED if all(ended) else UNFINISHED

    def __str__(self) -> str:
        if not self.config.seeds:
            return str(self.workdir)
        return f"{self.workdir}, seeds {', '.join(map(str, self.config.seeds))}"


def _with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    own = config.copy_and_resolve_references()
    own.seed = seed
    return own


def load_runs(path: str) -> list[Mapping[str, Any]]:
    """Return the runs that the file of a sweep lists.

    Args:
        path: of a file with a function `get_runs`; what follows a colon is its argument.

    Raises:
        UserError: the file is missing, raises an error, or returns no list of mappings; or a config
            is wrong regardless of the data, which is found before the first run is trained.
    """
    name, colon, argument = path.partition(":")
    module = load_module(pathlib.Path(name))
    if not hasattr(module, "get_runs"):
        raise UserError(f"{name} has no function get_runs, which every file of a sweep needs")
    try:
        runs = list(module.get_runs(argument) if colon else module.get_runs())
    except UserError:
        raise
    except Exception as error:  # whatever the file raises
        raise UserError(f"get_runs() of {name} fails: {type(error).__name__}: {error}") from error
    for run in runs:
        _check(run, name)
    if not runs:
        raise UserError(f"get_runs() of {name} returns no runs; it must list at least one")
    return runs


def _check(run: Any, name: str) -> None:
    where = f"get_runs() of {name} must return mappings with a config and, if wanted, seeds"
    if not isinstance(run, Mapping):
        raise UserError(f"{where}; found {run!r}")
    if unknown := run.keys() - {"config", "seeds"}:
        raise UserError(f"{where}; found the keys {sorted(map(str, unknown))}")
    config = run.get("config")
    if not isinstance(config, ConfigDict) or "seeds" not in config:
        raise UserError(f"{where}; found a config that does not start from default(): {config!r}")
    if not config.get("name"):
        raise UserError(f"get_runs() of {name} returns a run without config.name; give it one")
    seeds = run.get("seeds", (0,))
    whole = isinstance(seeds, Sequence) and {type(seed) for seed in seeds} == {int}
    if not whole or not 0 <= min(seeds) <= max(seeds) < 2**32:
        raise UserError(
            f"the seeds of the run {config.name} of {name} must be a tuple of whole numbers in 0 "
            f"to {2**32 - 1}; found {seeds!r}"
        )
    if config.seeds and tuple(run.get("seeds", config.seeds)) != tuple(config.seeds):
        raise UserError(
            f"the run {config.name} has the seeds {tuple(run['seeds'])}, and its config has the "
            f"seeds {tuple(config.seeds)}, which train in one program; leave one of them out"
        )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a run repeats its own warnings
            validate(config)
    except UserError as error:
        raise UserError(f"the run {config.name} of {name}: {error}") from error


def plan(runs: Sequence[Mapping[str, Any]], out: str | pathlib.Path) -> list[Planned]:
    """Return the calls of `ipwd_jax.train.run` that a sweep consists of, in order.

    Args:
        runs: mappings as `load_runs` returns them.
        out: the folder of all runs, where they share teachers and the teachers' answers.

    Raises:
        UserError: two runs would have the same folder.
    """
    planned = []
    for run in runs:
        config = run["config"]
        if config.seeds:
            planned.append(Planned(config, pathlib.Path(out) / config.name))
            continue
        for seed in run.get("seeds", (config.seed,)):
            folder = pathlib.Path(out) / f"{config.name}_seed{seed}"
            planned.append(Planned(_with_seed(config, seed), folder))
    times = collections.Counter(folder for run in planned for folder in run.folders())
    twice = [str(folder) for folder, count in times.items() if count > 1]
    if twice:
        raise UserError(f"several runs have the folder {twice[0]}; give each its own config.name")
    return planned


def carry_out(planned: Sequence[Planned], minutes: float = 0.0) -> list[str]:
    """Train the runs that are not finished, one after the other.

    A run that another process is working on is passed over. Once the others are done, it is tried
    again, because that process may have been stopped.

    Args:
        planned: the runs.
        minutes: time after which the run in progress is saved and no other is begun; 0: no limit.
            A limit needs the main thread.

    Returns:
        The state of each run: `FINISHED`, `FAILED`, `IN_USE` or `UNFINISHED`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run is saved.
        UserError: several processes train together.
    """
    if parallel.process_count() > 1:
        raise UserError(
            "several processes that train together cannot share a sweep; give each process runs of "
            "its own with --index and --count, or train the runs one by one"
        )
    states = [run.state() for run in planned]
    if states:
        print(f"{states.count(FINISHED)} of {len(states)} runs are finished already", flush=True)
    with _budget(minutes) as budget:
        ended_one = True
        while ended_one and not budget.spent:
            ended_one = False
            for i, run in enumerate(planned):
                if not budget.spent and states[i] in (IN_USE, UNFINISHED):
                    print(f"Run {i + 1} of {len(planned)}: {run}", flush=True)
                    states[i] = _attempt(run, budget)
                    ended_one |= states[i] == FINISHED
    if budget.spent:
        print(f"The {minutes:g} minutes of this call are over", flush=True)
    return states


def _attempt(run: Planned, budget: "_Budget") -> str:
    """Train one run as far as possible, and return its state."""
    try:
        with budget.interrupts():
            train.run(run.config, run.workdir)
        return FINISHED
    except InUse:
        print(f"{run.workdir} is {IN_USE}", flush=True)
        return IN_USE
    except (Interrupted, KeyboardInterrupt, BrokenPipeError):
        if not budget.spent:
            raise
        return run.state()
    except Exception as error:
        if not isinstance(error, UserError):  # an error of XLA, say; other runs may be possible
            traceback.print_exc()
        print(f"error: {run.workdir}: {error}", file=sys.stderr, flush=True)
        return FAILED
    finally:
        jax.clear_caches()  # each program takes memory, and no other run needs it


class _Budget:
    """The time of a sweep; when it is over, it acts like Ctrl-C on the run in progress.

    Attributes:
        spent: whether the time is over.
    """

    def __init__(self) -> None:
        self.spent = False
        self._in_a_run, self._saving = False, False
        self._usual = signal.getsignal(signal.SIGINT)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Let the end of the time interrupt what runs in this context."""
        self._in_a_run = True
        try:
            yield
        finally:
            self._in_a_run = False

    def ring(self, *_: Any) -> None:
        """Handle the signal of the timer."""
        self.spent = True
        if not self._in_a_run or self._saving:
            return
        if signal.getsignal(signal.SIGINT) is self._usual:
            raise KeyboardInterrupt  # no run is training, so there is nothing to save
        self._saving = True  # a second SIGINT would end the process before everything is saved
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _budget(minutes: float) -> Iterator[_Budget]:
    budget = _Budget()
    if not minutes:
        yield budget
        return
    previous = signal.signal(signal.SIGALRM, budget.ring)
    # An exception that is raised while Python destroys an object is lost, so the timer repeats.
    signal.setitimer(signal.ITIMER_REAL, min(60 * minutes, _LONGEST_TIMER), _RING_AGAIN)
    try:
        yield budget
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def table(planned: Sequence[Planned]) -> str:
    """Return the top-1 accuracy of the finished runs in %, with its deviation over the seeds.

    There is one line for each `config.name`. It has the mean and the sample standard deviation of
    the accuracy after the last and after the best epoch. Files of results that cannot be read are
    named on standard error.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for run in planned:
        for result in _results(run):
            results.setdefault(run.config.name, []).append(result)
    if not results:
        return "No run is finished yet"
    cells = [["run", "seeds", "last epoch, top1", "best epoch, top1"]]
    for name, of_seeds in results.items():
        scores = (
            mean_and_deviation([result[which]["top1"] for result in of_seeds], ".2f")
            for which in ("last", "best")
        )
        cells.append([name, ",".join(str(result["seed"]) for result in of_seeds), *scores])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _results(run: Planned) -> list[dict[str, Any]]:
    """Return what the `result.json` of each seed holds; nothing while a seed is not finished."""
    if run.state() != FINISHED:
        return []
    found = []
    for folder in run.folders():
        try:
            found.append(load_run(folder).result)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
    return found


def _summary(planned: Sequence[Planned], states: Sequence[str], out: pathlib.Path) -> str:
    """Say how many runs are in which state, which are not finished, and what to do next."""
    counts = collections.Counter(states)
    kinds = [kind for kind in (FINISHED, FAILED, IN_USE, UNFINISHED) if counts[kind]]
    runs = "1 run" if len(planned) == 1 else f"{len(planned)} runs"
    lines = [f"{runs}: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds)]
    for run, state in zip(planned, states, strict=True):
        if state != FINISHED:
            lines.append(f"  {state}: {run}")
    if counts[FINISHED] < len(planned):
        lines.append("The same command continues with the runs that are not finished.")
    if counts[FINISHED]:
        lines.append(f"A report with figures: python -m ipwd_jax.report {out}/*")
    return "\n".join(lines)


def _listing(planned: Sequence[Planned]) -> str:
    lines = []
    for number, run in enumerate(planned, 1):
        begun = any((folder / "config.json").exists() for folder in run.folders())
        state = "not begun" if not begun else run.state()
        lines.append(f"Run {number} of {len(planned)}: {run}: {state}")
    return "\n".join(lines)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not (minutes > 0 and math.isfinite(minutes)):
        raise argparse.ArgumentTypeError(f"must be a positive number, found {text}")
    return minutes


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ipwd_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=FILE [--out=DIR] [--minutes=M] [--index=I --count=N] [options]",
    )
    parser.add_argument("--config", required=True, help="file with a function get_runs")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs"), help="folder; default: runs"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=0.0, help="stop after so many; default: no limit"
    )
    parser.add_argument("--index", type=int, default=0, help="first run of this call, from 0 on")
    parser.add_argument("--count", type=int, default=1, help="take every COUNTth run from there")
    parser.add_argument("--xla_profile", default="", help="compiler settings, as for ipwd_jax.main")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and stop")
    given = parser.parse_args(argv)
    given.out = given.out.expanduser()
    if given.count < 1 or not 0 <= given.index < given.count:
        parser.error(
            f"--index must be in 0 to --count - 1, found --index={given.index} and "
            f"--count={given.count}"
        )
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the docstring of the module lists the statuses that it exits with."""
    given = _arguments(argv)
    logging.set_verbosity(logging.ERROR)
    python_logging.captureWarnings(True)
    with signals.exit_statuses(), signals.acknowledged():
        xla.apply(given.xla_profile)
        planned = plan(load_runs(given.config), given.out)[given.index :: given.count]
        # Its file was loaded after the other flags were set, because it can make arrays.
        if any(one.config.deterministic for one in planned):
            xla.apply(given.xla_profile, deterministic=True)
        if given.dry_run:
            print(_listing(planned))
            return
        states = carry_out(planned, given.minutes)
        print(table(planned))
        print(_summary(planned, states, given.out), flush=True)
    sys.exit(FAILED in states)


if __name__ == "__main__":
    main()
