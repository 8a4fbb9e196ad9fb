"""Commands that are killed at a chosen moment, and what must be equal after they ran again.

This file is also a script. `python faults_helpers.py PLACE MODULE ARGUMENTS` runs a module as a
command, and prints a line each time that the function PLACE is about to be called. A test reads
these lines, and so knows in which phase the process is that it kills.
"""

import csv
import functools
import json
import pkgutil
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MARK = "@ the place is reached"
CHOSEN: list[Any] = []  # configs, the last of which a config file of a test returns
# Numbers that differ between two runs of the same config.
_TIMES = ("images_per_second", "train_seconds")

# A config file with the settings of a run in get_config(), and a sweep in get_runs().
CONFIG = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import settings, squares
from ipwd_jax import data, view_files

data.SOURCES["squares"] = lambda config: squares()
view_files._FLUSH_SECONDS = 0.0  # a table is resumed from the batch that was written last

CONSTANT = {{"optimizer__milestones": (), "teacher__optimizer__milestones": (),
            "first_stage__optimizer__milestones": (), "checkpoint__every_seconds": 0.0}}

def get_config():
    first = {{"first_stage__epochs": 1, "first_stage__loss__kd": 1.0}}
    crops = {{"data__crop_padding": 3, "teacher__view_cache": "all"}}
    return settings(name="kills", **CONSTANT, **first, **crops)

def get_runs():
    kd = settings(name="kd", weighting__name="uniform", loss__cls=0.0, epochs=1, **CONSTANT)
    return [{{"config": kd, "seeds": (0, 1)}}]
"""


def a_classifier():
    """Return a classifier with a tiny network that is not trained."""
    import jax
    from helpers import Tiny

    from ipwd_jax.runs import Classifier

    network = Tiny(2)
    variables = network.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    return Classifier(network, variables, ("a", "b"), (8, 8, 1), np.zeros(1), np.ones(1))


def command(place: str, module: str, *arguments: object) -> list[str]:
    """Return a command that runs a module and says whenever it reaches `place`."""
    return [sys.executable, __file__, place, module, *map(str, arguments)]


def killed(
    command: list[str], environment: dict[str, str], number: int, seconds: float
) -> tuple[bool, str]:
    """Run a command, and kill it some seconds after it has reached its place `number` times.

    Returns:
        Whether it was killed, and what it had printed. A command that ends before is not killed.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, reached = [], 0
    for line in process.stdout:
        lines.append(line)
        reached += MARK in line
        if reached == number:
            time.sleep(seconds)
            process.kill()
            break
    lines += [process.communicate(timeout=500)[0]]
    output = "".join(lines)
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode != 0, output


def finished(command: list[str], environment: dict[str, str]) -> str:
    """Run a command to its end, and return what it printed."""
    return killed(command, environment, -1, 0.0)[1]


def contents(run: Path) -> dict[str, object]:
    """Return all numbers of a finished run: its arrays, its metrics and its result."""
    arrays = {}
    for path in sorted(run.glob("*.npz")):
        with np.load(path) as file:
            arrays |= {f"{path.name}/{name}": file[name].tobytes() for name in file.files}
    with (run / "metrics.csv").open() as file:
        rows = [_without_times(row) for row in csv.DictReader(file)]
    result = _without_times(json.loads((run / "result.json").read_text()))
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    checksums = json.loads((newest / "meta" / "metadata").read_text())["checksums"]
    del checksums["position"]  # it covers the training time
    return {**arrays, "metrics": rows, "result": result, "checksums": checksums}


def _without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in _TIMES}


def _say(place: str) -> None:
    """Let a function print `MARK` before each of its calls."""
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*arguments, **named):
        print(MARK, flush=True)
        return function(*arguments, **named)

    setattr(owner, name, marked)


if __name__ == "__main__":
    _say(sys.argv[1])
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
