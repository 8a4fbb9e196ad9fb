"""Measure how long a training step takes to compile, without and with XLA's persistent cache.

    python benchmarks/compile.py [--pair resnet20,resnet8] [--precision bfloat16]

Compiles the step in a fresh process with an empty cache, and then in another fresh process with the
cache that the first one has filled. Prints one JSON line for each.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time

import jax
from our_arm import OurArm, make_problem

from ipwd_jax.precision import PRECISIONS


def compile_once(arguments: argparse.Namespace) -> dict[str, float | str]:
    """Compile the step in this process; return the seconds of each part, and JAX's version."""
    jax.config.update("jax_compilation_cache_dir", arguments.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    pair = tuple(arguments.pair.split(","))
    problem = make_problem(pair, arguments.steps_per_call, arguments.batch, size=1_000)
    arm = OurArm(problem, arguments.precision, arguments.teacher, arguments.steps_per_call)
    started = time.perf_counter()
    lowered = arm.compiled.lower((arm.now,), *arm.next_arguments())
    traced = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    return {
        "trace_seconds": round(traced - started, 3),
        "compile_seconds": round(ended - traced, 3),
        "jax": jax.__version__,
        "device": jax.local_devices()[0].device_kind,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", default="resnet20,resnet8", help="the networks, TEACHER,STUDENT")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--teacher", default="network", choices=("network", "folded"))
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--steps-per-call", type=int, default=1, help="steps of one call")
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Compile twice, each time in a process of its own, or once if a cache is given."""
    if arguments.cache:
        print(json.dumps(compile_once(arguments)))
        return
    settings = {key: value for key, value in vars(arguments).items() if key != "cache"}
    with tempfile.TemporaryDirectory() as cache:
        for case in ("cold", "warm"):
            command = [sys.executable, *sys.argv, f"--cache={cache}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
            line = {"case": case, **found, **settings, "machine": platform.machine()}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
