"""Measure how the time of a step grows with the number of seeds in one program.

    python benchmarks/seeds.py [--pair resnet32x4,resnet8x4] [--seeds 1,2,3,5] [--steps N]

The students differ in their parameters and see the same batches; the teacher's answers are cached
unless `--teacher` says otherwise. One program has the unrolled steps of all seeds, as a run with
`config.seeds` does. With `--vmap`, a step under `jax.vmap` over the seeds, which turns every
convolution into a grouped one, is timed for comparison. The cases take turns. Prints one JSON line
per case.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from our_arm import OurArm, make_problem
from step import ON_GPU

from ipwd_jax import parallel
from ipwd_jax.step import train_step


class Together:
    """The steps of several seeds in one program."""

    def __init__(self, arm: OurArm, seeds: int, vmap: bool) -> None:
        self.arm, self.seeds = arm, seeds
        now = [jax.tree.map(jnp.copy, arm.now) for _ in range(seeds)]
        for i, state in enumerate(now):
            scaled = jax.tree.map(lambda x, i=i: x * (1 + i / 1000), state.params)
            now[i] = parallel.replicate(state.replace(params=scaled))
        self.now = jax.tree.map(lambda *x: jnp.stack(x), *now) if vmap else tuple(now)
        spec = arm.experiment.step_spec(0)

        def mapped(states, data, inputs, *rows):
            rows = [of_seeds[0] for of_seeds in rows]
            return jax.vmap(lambda state: train_step(spec, state, data, inputs, *rows))(states)

        self._compiled: Callable = (
            parallel.compile_train_step(mapped) if vmap else arm.experiment.train_step(0)
        )

    def run(self, steps: int) -> float:
        """Make `steps` calls; return the seconds per step."""
        rest = self.arm.next_arguments(self.seeds)
        started = time.perf_counter()
        for _ in range(steps):
            self.now = self._compiled(self.now, *rest)
        jax.block_until_ready(self.now)
        return (time.perf_counter() - started) / steps / self.arm.steps_per_call


def main(options: argparse.Namespace) -> None:
    """Time every number of seeds and print one line for each."""
    pair, counts = tuple(options.pair.split(",")), sorted(map(int, options.seeds.split(",")))
    problem = make_problem(pair, max(options.chunk, 2) * 2, options.batch, size=4096)
    arm = OurArm(problem, options.precision, options.teacher, options.chunk)
    arms = {("unrolled", s): Together(arm, s, vmap=False) for s in {1, *counts}}
    if options.vmap:
        arms |= {("vmap", s): Together(arm, s, vmap=True) for s in counts if s > 1}
    compile_seconds = {name: each.run(1) for name, each in arms.items()}
    times: dict = {name: [] for name in arms}
    for repeat in range(options.repeats):
        for name in sorted(arms, reverse=bool(repeat % 2)):
            times[name].append(arms[name].run(options.steps))
    one = statistics.median(times["unrolled", 1])
    for (how, seeds), seconds in sorted(times.items()):
        median = statistics.median(seconds)
        line = {
            "case": f"{how}, {seeds} seeds",
            "pair": ",".join(pair),
            "ms_per_step": round(1e3 * median, 3),
            "spread_ms": [round(1e3 * min(seconds), 3), round(1e3 * max(seconds), 3)],
            "over_one_seed": round(median / one, 3),
            "student_images_per_second": round(seeds * options.batch / median),
            "first_call_seconds": round(compile_seconds[how, seeds], 1),
        }
        print(json.dumps(line), flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="resnet32x4,resnet8x4" if ON_GPU else "resnet20,resnet8")
    parser.add_argument("--seeds", default="1,2,3,5" if ON_GPU else "1,2,3")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20 if ON_GPU else 10, help="calls per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=50 if ON_GPU else 1, help="steps per call")
    parser.add_argument("--precision", default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--teacher", default="cached", choices=("cached", "network", "folded"))
    parser.add_argument("--vmap", action="store_true", help="also time vmap over the seeds")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
