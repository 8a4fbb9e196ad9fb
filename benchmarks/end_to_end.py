"""Time whole runs: augmentation, teacher, student, metrics, checkpoints and evaluation.

    python benchmarks/end_to_end.py [--pair resnet32x4,resnet8x4] [--epochs 2] [--size 50000]

Trains the student of an untrained teacher on noise, through the same `train.run` as any other run:
once with the teacher asked in each step, and once with its answers to the views cached. Times the
usual eager PyTorch loop for comparison. Prints one JSON line per arm, with the seconds that 240
epochs of 50,000 images would take at the speed of the arm, not counting evaluation.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import numpy as np
from our_arm import make_problem, untrained_teacher
from step import ON_GPU, make_arm

from ipwd_jax import config as config_lib
from ipwd_jax import data, train

EPOCHS, TRAIN = 240, 50_000


def ours(options: argparse.Namespace, cache: str, folder: pathlib.Path) -> dict[str, float]:
    """Return a run's images per second, its seconds in all, and the seconds to fill its cache."""
    teacher, student = options.pair.split(",")
    problem = make_problem((teacher, student), 1, options.batch, size=options.size)
    test = options.size // 5
    dataset = data.from_arrays(
        problem.images, problem.labels, problem.images[:test], problem.labels[:test], name="noise"
    )
    workdir = folder / "teacher"
    if not workdir.exists():
        untrained_teacher(workdir, problem.variables["teacher"])
    config = config_lib.default()
    config.data.name, config.batch_size, config.epochs = "noise", options.batch, options.epochs
    config.model.name, config.teacher.name = student, teacher
    config.teacher.workdir, config.teacher.view_cache = str(workdir), cache
    config.precision, config.optimizer.learning_rate = options.precision, 1e-4
    config.loss.update({"ce": 0.1, "kd": 0.9})
    run = folder / f"student_{cache}"
    started = time.perf_counter()
    train.run(config, run, dataset)
    whole = time.perf_counter() - started
    rows = np.genfromtxt(run / "metrics.csv", delimiter=",", names=True, dtype=None, encoding=None)
    speeds = np.atleast_1d(rows["images_per_second"])[1:]  # without the first epoch, which compiles
    result = {"images_per_second": float(np.median(speeds)), "whole_seconds": whole}
    notes = list((workdir / "views").glob("*.json"))
    if cache != "off" and notes:
        result["cache_seconds"] = json.loads(notes[0].read_text())["seconds"]
    return result


def torch_loop(options: argparse.Namespace) -> dict[str, float]:
    """Return the images per second of the eager loop."""
    steps = max(2, min(options.epochs * options.size // options.batch, options.torch_steps))
    pair = tuple(options.pair.split(","))
    problem = make_problem(pair, 2 + steps, options.batch, size=options.size)
    arm = make_arm("torch_channels_last", problem, argparse.Namespace(reference="", chunk=1))
    arm.run(2)
    seconds, _ = arm.run(steps)
    return {"images_per_second": steps * options.batch / seconds}


def main(options: argparse.Namespace) -> None:
    """Time the arms one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "ours, teacher in the step": lambda: ours(options, "off", pathlib.Path(folder)),
            "ours, views cached": lambda: ours(options, options.cache, pathlib.Path(folder)),
            "PyTorch, eager": lambda: torch_loop(options),
        }
        for name, arm in arms.items():
            try:
                found = arm()
            except ImportError as error:
                found = {"skipped": str(error)}
            if speed := found.get("images_per_second"):
                found["seconds_of_240_epochs"] = EPOCHS * TRAIN / speed
            found = {k: round(v, 1) if isinstance(v, float) else v for k, v in found.items()}
            line = {"arm": name, "pair": options.pair, "device": jax.devices()[0].device_kind}
            print(json.dumps({**line, **found}), flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="resnet32x4,resnet8x4" if ON_GPU else "resnet20,resnet8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=TRAIN if ON_GPU else 2048)
    parser.add_argument("--precision", default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--cache", default="all" if ON_GPU else "drawn", choices=("all", "drawn"))
    parser.add_argument("--torch_steps", type=int, default=1000 if ON_GPU else 50)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
