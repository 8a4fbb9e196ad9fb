"""List the kernels of a training step, how long each takes, and how long the device is idle.

    python benchmarks/kernels.py [--pair TEACHER,STUDENT] [--arm ours_bfloat16] [--steps N]

Traces some steps of an arm of `step.py` with the profiler of its framework. Prints one JSON line
with the number of kernels in a step (on a CPU, operations of the program), the milliseconds per
step, and the share of the time in which no kernel runs. On a CPU, the time of operations that a
library computes in threads of its own counts as idle. Then prints a table of the kernels that take
longest.
"""

import argparse
import collections
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from our_arm import make_problem
from step import ON_GPU, make_arm, our_arms, torch_arms

Event = tuple[str, float, float]  # name, start and end in nanoseconds


def traced_by_jax(arm: Any, steps: int) -> Iterator[Event]:
    """Yield what the device does in this many steps of one of our arms."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            arm.run(steps)
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        for plane in planes:
            if ON_GPU and not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if ON_GPU and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if ON_GPU or any(key == "hlo_op" for key, _ in event.stats):
                        yield event.name, event.start_ns, event.end_ns


def traced_by_torch(arm: Any, steps: int) -> Iterator[Event]:
    """Yield what the device does in this many steps of one of PyTorch's arms."""
    import torch

    with torch.profiler.profile() as profile:
        arm.run(steps)
    kind = torch.autograd.DeviceType.CUDA if ON_GPU else torch.autograd.DeviceType.CPU
    for event in profile.events():
        if event.device_type == kind and (ON_GPU or event.cpu_parent is None):
            yield event.name, 1e3 * event.time_range.start, 1e3 * event.time_range.end


def busy(events: list[Event]) -> float:
    """Return the nanoseconds during which at least one event runs."""
    total, until = 0.0, 0.0
    for _, start, end in sorted(events, key=lambda event: event[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main(options: argparse.Namespace) -> None:
    """Trace the arm and print what was found."""
    options.child, options.reference = options.arm, ""
    if flags := our_arms(1).get(options.arm, {}).get("flags"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    warm_up = 2 * options.steps_per_call
    problem = make_problem(
        tuple(options.pair.split(",")), warm_up + options.steps, options.batch, options.images
    )
    arm = make_arm(options.arm, problem, options)
    arm.run(warm_up)
    trace = traced_by_torch if options.arm in torch_arms() else traced_by_jax
    events = list(trace(arm, options.steps))
    whole = max(end for *_, end in events) - min(start for _, start, _ in events)
    line = {
        "arm": options.arm,
        "pair": options.pair,
        "kernels_per_step": round(len(events) / options.steps, 1),
        "ms_per_step": round(whole / options.steps / 1e6, 3),
        "idle_share": round(1 - busy(events) / whole, 3),
        "device": jax.local_devices()[0].device_kind,
    }
    print(json.dumps(line))
    spent, count = collections.Counter(), collections.Counter()
    for name, start, end in events:
        spent[name] += (end - start) / options.steps / 1e6
        count[name] += 1 / options.steps
    print(f"{'ms/step':>10}{'calls':>8}  kernel")
    for name, ms in spent.most_common(options.top):
        print(f"{ms:10.3f}{count[name]:8.1f}  {name[:80]}")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = [*torch_arms(), *our_arms(1)]
    parser.add_argument("--pair", default="resnet32x4,resnet8x4" if ON_GPU else "resnet20,resnet8")
    parser.add_argument(
        "--arm", default="ours_bfloat16" if ON_GPU else "ours_float32", choices=arms
    )
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--images", type=int, default=50_000, help="size of the random data set")
    parser.add_argument("--steps", type=int, default=50 if ON_GPU else 3, help="traced steps")
    parser.add_argument("--steps-per-call", type=int, default=50 if ON_GPU else 1)
    parser.add_argument("--top", type=int, default=15, help="rows of the printed table")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
