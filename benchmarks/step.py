"""Compare the speed of our training step with that of plain PyTorch's for the same maths.

    python benchmarks/step.py [--pairs resnet32x4,resnet8x4;wrn_40_2,wrn_16_2] [--steps N]

Each pair must first pass a gate: both frameworks start from the same weights and take ten steps on
the same views of the same images, in float64 and with a hundredth of the learning rate. The losses
must agree to 1e-9 and the weights to 1e-6 of the distance that they moved; otherwise the pair is
not timed and the exit code is 1. With float32 or the full learning rate, rounding would decide: a
change in the last digit flips the ReLUs whose input is near zero, and a light network with batch
statistics doubles such a difference several times in each step of the usual length, in either
framework. How far apart ten float32 steps of the usual length end is printed, too.

Then the arms, which are ways of taking the step, take turns in one process. An arm that needs flags
of its own runs in a child process. Prints one JSON line per gate and one per arm.

On a CPU the machine must be idle: PyTorch's threads wait for each other by spinning, and beside
another busy process each of its operations can take ten times as long.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import flax
import jax
import numpy as np
from our_arm import CLASSES, OurArm, Problem, make_problem

from ipwd_jax import models, precision, xla
from ipwd_jax.models.__main__ import multiply_adds
from ipwd_jax.pytorch.names import to_torch

GATE_STEPS, GATE_LEARNING_RATE, LOSS_TOLERANCE, WEIGHT_TOLERANCE = 10, 0.01, 1e-9, 1e-6
BASELINE = "torch_channels_last"
ON_GPU = pathlib.Path("/dev/nvidiactl").exists()
EIGEN, GRAPHS = (" ".join(xla.PROFILES[name]) for name in ("cpu-eigen", "gpu-graphs"))


def torch_arms() -> dict[str, dict[str, Any]]:
    """Return the fields of `pytorch_arm.Variant` of each of PyTorch's arms."""
    arms = {
        "torch_nchw": {"channels_last": False},
        BASELINE: {},
        f"{BASELINE}_compile": {"compiled": True},
        "torch_bfloat16": {"bfloat16": True},
        "torch_bfloat16_compile": {"bfloat16": True, "compiled": True},
    }
    tf32 = {
        "torch_nchw_tf32": {"channels_last": False, "tf32": True},
        "torch_channels_last_tf32": {"tf32": True},
    }
    return arms | (tf32 if ON_GPU else {})


def our_arms(chunk: int) -> dict[str, dict[str, Any]]:
    """Return the arguments of `OurArm` after the problem, and `flags` for XLA, of each of our arms.

    Another way to take the same step needs one more line here.
    """
    arms: dict[str, dict[str, Any]] = {
        "ours_float32": {},
        "ours_float32_folded": {"teacher": "folded"},
        "ours_float32_cached": {"teacher": "cached"},
        "ours_bfloat16": {"precision": "bfloat16"},
        "ours_float32_student_only": {"teacher": ""},
    }
    if not ON_GPU:
        kinds = {"eigen": "network", "folded_eigen": "folded", "cached_eigen": "cached"}
        return arms | {
            f"ours_float32_{name}": {"teacher": kind, "flags": EIGEN}
            for name, kind in kinds.items()
        }
    chunked = {"precision": "bfloat16", "steps_per_call": chunk}
    return arms | {
        "ours_tf32": {"precision": "tf32"},
        "ours_tf32_chunk": {"precision": "tf32", "steps_per_call": chunk},
        "ours_bfloat16_chunk": chunked,
        "ours_bfloat16_chunk_folded": {**chunked, "teacher": "folded"},
        "ours_bfloat16_chunk_ahead": {**chunked, "teacher": "ahead"},
        "ours_bfloat16_chunk_cached": {**chunked, "teacher": "cached"},
        "ours_bfloat16_chunk_graphs": {**chunked, "flags": GRAPHS},
        "ours_bfloat16_chunk_student_only": {**chunked, "teacher": ""},
    }


class Child:
    """An arm in a child process whose XLA has other flags; it waits between its runs."""

    def __init__(self, name: str, pair: tuple[str, str], flags: str) -> None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        options = [f"--pairs={','.join(pair)}", f"--child={name}"]
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, *options],
            env={**os.environ, "XLA_FLAGS": flags},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._peak: int | None = None

    def run(self, steps: int) -> tuple[float, float]:
        """Run `OurArm.run` in the child process and return its result."""
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the child has ended, which the next line notices
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the child process ended with code {self._process.wait()}")
        seconds, loss, self._peak = json.loads(line)
        return seconds, loss

    def peak_memory(self) -> int | None:
        """Return `OurArm.peak_memory` of the child process after its latest run."""
        return self._peak

    def close(self) -> None:
        """End the child process."""
        self._process.stdin.close()
        self._process.wait()


def serve(arm: OurArm) -> None:
    """Read numbers of steps in the child process; print seconds, mean losses and peak bytes."""
    for line in sys.stdin:
        print(json.dumps([*arm.run(int(line)), arm.peak_memory()]), flush=True)


def torch_networks(problem: Problem, reference: str) -> list[Any]:
    """Return the student and the teacher in PyTorch, with our weights."""
    import pytorch_arm
    import torch

    def create(name: str) -> Any:
        if not reference:
            return pytorch_arm.create(name, CLASSES)
        if reference not in sys.path:
            sys.path.insert(0, reference)
        return importlib.import_module("models").model_dict[name](num_classes=CLASSES)

    names = {"student": problem.student, "teacher": problem.teacher}
    networks = []
    for role, name in names.items():
        tensors = {k: torch.from_numpy(x) for k, x in to_torch(problem.variables[role]).items()}
        networks.append(create(name))
        missing, unexpected = networks[-1].load_state_dict(tensors, strict=False)
        if wrong := unexpected + [n for n in missing if "num_batches_tracked" not in n]:
            raise ValueError(f"PyTorch's {name} has other tensors than ours: {wrong}")
    return networks


def make_arm(name: str, problem: Problem, arguments: argparse.Namespace) -> Any:
    """Make the arm of this name on the device."""
    if name in (variants := torch_arms()):
        import pytorch_arm

        variant = pytorch_arm.Variant(**variants[name])
        networks = torch_networks(problem, arguments.reference)
        return pytorch_arm.TorchArm(*networks, problem, variant)
    settings = our_arms(arguments.steps_per_call)[name]
    flags = settings.pop("flags", "")
    if flags and not arguments.child:
        return Child(name, (problem.teacher, problem.student), flags)
    return OurArm(problem, **settings)


def ten_steps(problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how far our steps and PyTorch's are apart in each of ten steps and after them."""
    ours, theirs = (make_arm(n, problem, arguments) for n in ("ours_float32", BASELINE))
    pairs = [(ours.run(1)[1], theirs.run(1)[1]) for _ in range(GATE_STEPS)]
    found = to_torch(jax.device_get(ours.now.network()))
    tensors = {k: x.detach().cpu().numpy() for k, x in theirs.student.state_dict().items()}
    start = to_torch(problem.variables["student"])
    names = [k for k in found if "running" not in k]

    def apart(a: dict, b: dict, names: list[str]) -> float:
        distance = sum(float(np.square(a[k] - b[k]).sum()) for k in names)
        return (distance / sum(float(np.square(b[k]).sum()) for k in names)) ** 0.5

    return {
        "loss_errors": [float(f"{abs(a - b) / abs(b):.2g}") for a, b in pairs],
        "weight_error": apart(found, tensors, names),
        "weights_moved": apart(start, tensors, names),
        "worst_weight_difference": max(float(abs(found[k] - tensors[k]).max()) for k in names),
        "statistics_error": apart(found, tensors, [k for k in found if k not in names]),
        "first_and_last_loss": [pairs[0][1], pairs[-1][1]],
    }


def gate(problem: Problem, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return whether ten of our steps agree with PyTorch's, and how closely."""
    slower = GATE_LEARNING_RATE * problem.learning_rate
    with jax.enable_x64(True):
        found = ten_steps(
            dataclasses.replace(problem.double(), learning_rate=float(np.float32(slower))),
            arguments,
        )
    losses_agree = max(found["loss_errors"]) <= LOSS_TOLERANCE
    weights_agree = found["weight_error"] <= WEIGHT_TOLERANCE * found["weights_moved"]
    passed = losses_agree and weights_agree
    return {
        "gate": "passed" if passed else "failed",
        **found,
        "float32": ten_steps(problem, arguments),
    }


def time_arms(problem: Problem, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the arms in turn, in reverse order every other time; return what each one measured."""
    arms: dict[str, Any] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name in arguments.arms:
        try:
            arm = make_arm(name, problem, arguments)
            compiling, _ = arm.run(arguments.steps_per_call)
            _, loss = arm.run(arguments.warm_up)
        except Exception as error:  # an arm that cannot run here must not stop the others
            measured[name] = {"skipped": f"{type(error).__name__}: {error}"[:300]}
            continue
        arms[name] = arm
        measured[name] = {
            "first_call_seconds": round(compiling, 2),
            "warm_up_loss": loss,
            "peak_memory_bytes": arm.peak_memory(),
            "ms_of_runs": [],
        }
    for turn in range(arguments.repeats):
        for name in [*arms][:: -1 if turn % 2 else 1]:
            seconds, _ = arms[name].run(arguments.steps)
            measured[name]["ms_of_runs"].append(1e3 * seconds / arguments.steps)
    for arm in arms.values():
        if isinstance(arm, Child):
            arm.close()
    return measured


def report(
    name: str, found: dict[str, Any], baseline: float | None, problem: Problem
) -> dict[str, Any]:
    """Return the line of an arm, from its measurements and the milliseconds of the baseline."""
    if "skipped" in found:
        return {"arm": name, **found}
    times = found.pop("ms_of_runs")
    median, batch = statistics.median(times), problem.index.shape[1]
    return {
        "arm": name,
        **arithmetic(name, problem, median),
        "images_per_second": round(1e3 * batch / median, 1),
        "ms_per_step": round(median, 3),
        "ms_range": [round(min(times), 3), round(max(times), 3)],
        "seconds_of_240_epochs": round(240 * -(-50_000 // batch) * median / 1e3),
        f"speed_over_{BASELINE}": baseline and round(baseline / median, 3),
        **found,
    }


@functools.cache
def matmul_speed(rounding: str) -> float:
    """Return the FLOP/s of the fastest of ten products of two large matrices on this device."""
    size = 8192 if ON_GPU else 2048
    dtype = jax.numpy.bfloat16 if rounding == "bfloat16" else jax.numpy.float32
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    with precision.of_products(rounding):
        multiply = jax.jit(jax.numpy.dot).lower(x, x).compile()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def arithmetic(name: str, problem: Problem, ms: float) -> dict[str, float]:
    """Return the TFLOP/s of an arm, and its share of the speed of a matrix product.

    A step counts as one forward pass of the teacher, if the step asks it, and three of the student.
    For the first convolution, whose input needs no gradient, that is a bit more than is computed.
    """
    settings = {**torch_arms(), **our_arms(1)}[name]
    networks = {problem.student: 3}
    if settings.get("teacher") not in ("cached", ""):
        networks[problem.teacher] = networks.get(problem.teacher, 0) + 1
    shape = problem.images.shape[1:]
    counts = (n * multiply_adds(models.create(k, CLASSES), shape) for k, n in networks.items())
    speed = 2 * problem.index.shape[1] * sum(counts) / (1e-3 * ms)
    of_torch = "bfloat16" if "bfloat16" in settings else "tf32" if "tf32" in settings else "float32"
    rounding = settings.get("precision", of_torch)
    found = {"tflops": round(speed / 1e12, 3)}
    if ON_GPU or rounding == "float32":  # on a CPU, XLA's bfloat16 products are slow
        found["share_of_matmul"] = round(speed / matmul_speed(rounding), 3)
    return found


def surroundings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the versions, the device and the settings, which every line repeats."""
    found = {"jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__}
    if not arguments.child:
        import torch

        found["torch"] = torch.__version__
        if not ON_GPU:
            torch.set_num_threads(arguments.threads)
    return {
        **found,
        "python": platform.python_version(),
        "device": jax.local_devices()[0].device_kind,
        "threads": arguments.threads,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
    }


def run_pair(pair: tuple[str, str], arguments: argparse.Namespace, common: dict[str, Any]) -> bool:
    """Print the lines of a pair; return whether it passed the gate."""
    per_run = (arguments.steps_per_call, arguments.warm_up, arguments.repeats * arguments.steps)
    problem = make_problem(
        pair,
        max(GATE_STEPS, sum(per_run)),
        arguments.batch,
        arguments.images,
        arguments.image_size,
    )
    if arguments.child:
        serve(make_arm(arguments.child, problem, arguments))
        return True
    names = {"teacher": pair[0], "student": pair[1]}
    passed = gate(problem, arguments)
    print(json.dumps({**passed, **names, **common}), flush=True)
    if passed["gate"] == "failed" or arguments.gate_only:
        return passed["gate"] == "passed"
    measured = time_arms(problem, arguments)
    runs = measured.get(BASELINE, {}).get("ms_of_runs")
    baseline = statistics.median(runs) if runs else None
    for name, found in measured.items():
        line = report(name, found, baseline, problem)
        load = {"load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps({**line, **names, **common, **load}), flush=True)
    return True


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line, whose defaults depend on whether there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    headline = "resnet32x4,resnet8x4" if ON_GPU else "resnet20,resnet8"
    parser.add_argument("--pairs", default=headline, help="TEACHER,STUDENT[;TEACHER,STUDENT...]")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--steps", type=int, default=500 if ON_GPU else 5, help="steps per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs per arm")
    parser.add_argument("--warm-up", type=int, default=50 if ON_GPU else 2, help="untimed steps")
    parser.add_argument(
        "--steps-per-call", type=int, default=50 if ON_GPU else 1, help="of the *_chunk* arms"
    )
    known = [*torch_arms(), *our_arms(1)]
    parser.add_argument("--arms", default=",".join(known), help="a subset of the default")
    parser.add_argument("--reference", default="", help="folder whose models/ PyTorch runs")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)) if ON_GPU else 2
    )
    parser.add_argument("--images", type=int, default=50_000, help="size of the random data set")
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--gate-only", action="store_true", help="check the gate, but time nothing")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.arms = found.arms.split(",")
    if unknown := [name for name in found.arms if name not in known]:
        parser.error(f"unknown arm {unknown[0]!r} in --arms; choose from {', '.join(known)}")
    chunk = found.steps_per_call
    if found.steps % chunk or found.warm_up % chunk:
        parser.error(
            f"--steps and --warm-up must be multiples of --steps-per-call, which is {chunk}; found "
            f"{found.steps} and {found.warm_up}"
        )
    return found


def main(arguments: argparse.Namespace) -> int:
    """Run all pairs; return the exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    # XLA starts a thread for each core that the process is allowed to use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    common = surroundings(arguments)
    pairs = [tuple(pair.split(",")) for pair in arguments.pairs.split(";")]
    return 1 - all([run_pair(pair, arguments, common) for pair in pairs])


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
