"""Measure what each loss term adds to a training step: time relative to plain KD, and memory.

    python benchmarks/losses.py [--pair TEACHER,STUDENT] [--batch 64] [--steps N] [--terms a,b,...]

Each term is trained with its published loss weights in the compiled step of a run, on a random data
set of CIFAR-100's size that resides on the device. Calls of its step alternate with calls of the
step of plain KD (0.1 cross-entropy + 0.9 KD) with the same batch size. `ab` and `fsp`, the losses
of a first stage, are timed as losses of the main stage. Prints one JSON line about the machine, one
per term, and a table. `ratio` is the time of a call of the term's step over that of the paired call
of KD's, as the median and, in `ratio_quartiles`, the outer quartiles over all pairs.

`temp_mib` is the memory that the compiled step needs in addition to its arguments and results.
`peak_mib` is the most memory that the device has held since the process began. It never falls, so
run a single term to get the peak of that term.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import losses, models, parallel
from ipwd_jax.assemble import assemble
from ipwd_jax.data.base import STATISTICS, Dataset, Split
from ipwd_jax.data.resident import Resident, resident
from ipwd_jax.errors import UserError, unknown_name
from ipwd_jax.teacher import Teacher, from_variables

IMAGES, SHAPE, CLASSES, EPOCHS = 50_000, (32, 32, 3), 100, 240
WARMUP_CALLS = 2
CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "cifar_baselines.py"
KD = {"ce": 0.1, "kd": 0.9}
# Terms that are not methods of their own in the published tables.
WEIGHTS = {
    "cls": {**KD, "cls": 1.0},
    "kd_head": {**KD, "kd_head": 0.9},
    "pskd": {"pskd": 1.0},
    "ab": {"ce": 1.0, "ab": 1.0},
    "fsp": {"ce": 1.0, "fsp": 1.0},
}
COLUMNS = ("term", "ms", "kd_ms", "ratio", "ratio_quartiles", "temp_mib", "peak_mib", "compile_s")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all arms share.

    Attributes:
        config: the config of a run, in which every loss weight is 0.
        dataset: a data set of random images.
        teacher: a teacher with random parameters.
        data: the training set, on all devices.
        calls: the remaining arguments of each call of a step, which are used in turn.
    """

    config: ConfigDict
    dataset: Dataset
    teacher: Teacher
    data: Resident
    calls: list[tuple[tuple, tuple, tuple]]


class Arm:
    """A compiled training step and its state.

    Attributes:
        temp_bytes: memory that the program needs in addition to its arguments and results, or None
            if it is not known.
        compile_seconds: how long the compilation took.
    """

    def __init__(self, bench: Bench, weights: Mapping[str, float]) -> None:
        """Compile the step for a loss with these weights, and take its first steps untimed."""
        self._bench, self._called = bench, 0
        config = bench.config.copy_and_resolve_references()
        config.loss.update(weights)
        experiment = assemble(config, bench.dataset, bench.teacher)
        self._step = experiment.train_step(0)
        self._state = parallel.replicate(experiment.begin(0, experiment.initial_state(seed=0)))
        started = time.perf_counter()
        arguments = (self._state,), bench.data, bench.teacher.inputs, *bench.calls[0]
        memory = self._step.lower(*arguments).compile().memory_analysis()
        self.compile_seconds = time.perf_counter() - started
        self.temp_bytes = memory.temp_size_in_bytes if memory else None
        for _ in range(WARMUP_CALLS):
            self.call()

    def call(self) -> float:
        """Make the next call, wait for its result, and return its milliseconds per step."""
        bench = self._bench
        rows = bench.calls[self._called % len(bench.calls)]
        self._called += 1
        started = time.perf_counter()
        (self._state,) = self._step((self._state,), bench.data, bench.teacher.inputs, *rows)
        jax.block_until_ready(self._state)
        (index,) = rows[0]
        return 1e3 * (time.perf_counter() - started) / len(index)

    def finite(self) -> bool:
        """Return whether all losses have been finite so far."""
        return all(int(first) < 0 for first in self._state.nonfinite.values())


def make_bench(teacher: str, student: str, batch: int, steps_per_call: int) -> Bench:
    """Put random data and a random teacher on all devices."""
    for name in (teacher, student):
        models.check_input(name, *SHAPE[:2])
    config = config_lib.default()
    config.model.name, config.teacher.name = student, teacher
    config.batch_size, config.epochs, config.steps_per_call = batch, EPOCHS, steps_per_call
    # This rate is so small that an untrained teacher's answers cannot drive a loss to infinity.
    config.optimizer.learning_rate = 1e-6
    config.loss.ce = 0.0
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, *SHAPE), np.uint8)
    train = Split(images, rng.permutation(np.arange(IMAGES, dtype=np.int32) % CLASSES))
    mean, std = (np.asarray(x, np.float32) for x in STATISTICS["cifar100"])
    names = tuple(map(str, range(CLASSES)))
    dataset = Dataset("noise", train, train, names, mean, std)
    network = models.create(teacher, CLASSES)
    variables = jax.jit(network.init)(jax.random.key(1), np.zeros((1, *SHAPE), np.float32))
    # Terms can read the teacher's logits on the training set; these give each class a random mass.
    mass = np.random.default_rng(1).dirichlet(np.ones(CLASSES))
    asked = dataclasses.replace(
        from_variables(config, variables, dataset), train_logits=np.log(mass)[None]
    )
    full = IMAGES // batch  # without the last batch of an epoch, which can have padding rows
    if full < steps_per_call:
        raise UserError(
            f"--batch {batch} leaves {full} full steps in an epoch, but one call takes "
            f"{steps_per_call}; choose a smaller batch size"
        )
    feed = assemble(config, dataset, asked).batches(
        seed=0, epoch=0, end=full // steps_per_call * steps_per_call
    )
    calls = [tuple((x,) for x in rows) for rows in feed]
    return Bench(config, dataset, asked, parallel.replicate(resident(dataset, train)), calls)


def compare(name: str, weights: Mapping[str, float], bench: Bench, kd: Arm, calls: int) -> dict:
    """Return a term's numbers, from `calls` calls of its step alternating with as many of KD's."""
    arm = Arm(bench, weights)
    kd.call()  # refills the caches that compilation has evicted
    of_term, of_kd = [], []
    for i in range(calls):
        pair = [(arm, of_term), (kd, of_kd)]
        for which, times in pair if i % 2 else pair[::-1]:
            times.append(which.call())
    low, ratio, high = np.percentile(np.divide(of_term, of_kd), (25, 50, 75)).round(3).tolist()
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "term": name,
        "weights": dict(weights),
        "ms": round(float(np.median(of_term)), 3),
        "kd_ms": round(float(np.median(of_kd)), 3),
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "temp_mib": _mib(arm.temp_bytes),
        "peak_mib": _mib(peak),
        "compile_s": round(arm.compile_seconds, 1),
        "finite": arm.finite(),
    }


def _mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 1)


def weights_of(name: str) -> dict[str, float]:
    """Return the loss weights that a term is timed with, the published ones if there are any."""
    published = runpy.run_path(str(CONFIG))["LOSSES"]
    return WEIGHTS.get(name) or published.get(name) or {"ce": 1.0, name: 1.0}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the lines of the terms as a table."""
    cells = [COLUMNS]
    for row in rows:
        found = (row.get(column, "") for column in COLUMNS)
        cells.append(tuple("-" if x is None else str(x) for x in found))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row, line in zip([{}, *rows], cells, strict=True):
        aligned = [line[0].ljust(widths[0])]
        if "error" in row:
            aligned.append(row["error"])
        else:
            aligned += [x.rjust(width) for x, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(aligned))
    return "\n".join(lines)


def environment(options: argparse.Namespace, steps_per_call: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    device = jax.local_devices()[0]
    about = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": parallel.device_count(),
        "threads": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "pair": options.pair,
        "batch": options.batch,
        "steps": options.steps,
        "steps_per_call": steps_per_call,
        "precision": config_lib.default().precision,
    }
    if options.small:
        about["note"] = "on a CPU the default is a small pair and few steps; choose with --pair"
    return about


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options, whose defaults suit the platform.

    Raises:
        UserError: a value is wrong; the message says which one.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", default="", help="the networks, TEACHER,STUDENT")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--steps", type=int, default=0, help="timed steps per arm")
    parser.add_argument("--terms", default="", help="comma-separated names; default: all terms")
    options = parser.parse_args(arguments)
    on_cpu = jax.default_backend() == "cpu"
    options.small = on_cpu and not options.pair
    options.pair = options.pair or ("resnet20,resnet8" if on_cpu else "resnet32x4,resnet8x4")
    options.steps = options.steps or (10 if on_cpu else 200)
    options.terms = options.terms.split(",") if options.terms else list(losses.TERMS)
    if options.pair.count(",") != 1:
        raise UserError(f"--pair must be two networks, TEACHER,STUDENT, found {options.pair!r}")
    if min(options.batch, options.steps) < 1:
        raise UserError(
            f"--batch and --steps must be at least 1, found {options.batch} and {options.steps}"
        )
    for name in options.terms:
        if name not in losses.TERMS:
            raise unknown_name("loss term", name, losses.TERMS)
    return options


def main(arguments: Sequence[str]) -> None:
    """Time the terms and print what they add to a step."""
    options = parse(arguments)
    # As in a run: several steps per call hide Python's time if steps are short, but not on a CPU.
    steps_per_call = 1 if jax.default_backend() == "cpu" else 10
    bench = make_bench(*options.pair.split(","), options.batch, steps_per_call)
    print(json.dumps(environment(options, steps_per_call)), flush=True)
    kd = Arm(bench, KD)
    rows = []
    for name in options.terms:
        try:
            row = compare(name, weights_of(name), bench, kd, -(-options.steps // steps_per_call))
        except Exception as error:  # the other terms are timed all the same
            row = {"term": name, "error": str(error).partition("\n")[0] or repr(error)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
