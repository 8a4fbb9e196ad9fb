"""Measure how fast a teacher answers, and how far its logits are from those in float32.

    python benchmarks/teacher.py [--network resnet32x4] [--batches 64,1024] [--repeats 5]

Prints one JSON line for each precision, with and without folded BatchNorm, and for each batch size.
It has the images per second (the median of the repeats), the speed in TFLOP/s, and the same errors
that a run reports.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from our_arm import CLASSES, Problem, make_problem
from step import ON_GPU

from ipwd_jax import config as config_lib
from ipwd_jax import models, precision
from ipwd_jax.data import augment
from ipwd_jax.models.__main__ import multiply_adds
from ipwd_jax.precision import PRECISIONS
from ipwd_jax.teacher import compare, from_variables


def forms(problem: Problem) -> Iterator[tuple[dict[str, Any], Callable, Any]]:
    """Yield the settings of each form of the teacher, its compiled function, and its variables."""
    mean, std = jnp.asarray(problem.mean), jnp.asarray(problem.std)
    for rounding, folded in itertools.product(PRECISIONS, (False, True)):
        config = config_lib.default()
        config.precision, config.teacher.fold = rounding, folded
        config.teacher.name = problem.teacher
        teacher = from_variables(config, problem.variables["teacher"], problem.dataset())

        @jax.jit
        def logits(inputs: Any, images: jax.Array, rounding=rounding, ask=teacher.ask) -> jax.Array:
            images = augment.normalize(images, mean, std)
            with precision.of_products(rounding):
                return precision.at_least_float32(ask(inputs, images).logits)

        yield {"precision": rounding, "folded": folded}, logits, teacher.inputs


def main(options: argparse.Namespace) -> None:
    """Time all combinations."""
    sizes = [int(size) for size in options.batches.split(",")]
    problem = make_problem((options.network, "resnet8"), 1, max(sizes), max(sizes))
    network, shape = models.create(options.network, CLASSES), problem.images.shape[1:]
    flops, exact = 2 * multiply_adds(network, shape), None
    for settings, logits, inputs in forms(problem):
        for size in sizes:
            images = jax.device_put(problem.images[:size])
            answers = np.asarray(logits(inputs, images))
            exact = answers if exact is None or len(exact) < size else exact
            seconds = []
            for _ in range(options.repeats):
                started = time.perf_counter()
                for _ in range(options.calls):
                    last = logits(inputs, images)
                last.block_until_ready()
                seconds.append((time.perf_counter() - started) / options.calls)
            speed = size / statistics.median(seconds)
            line = {
                "network": options.network,
                **settings,
                "batch": size,
                "images_per_second": round(speed, 1),
                "tflops": round(speed * flops / 1e12, 3),
                **{k: float(f"{v:.3g}") for k, v in compare(answers, exact[:size]).items()},
                "device": jax.local_devices()[0].device_kind,
            }
            print(json.dumps(line), flush=True)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet32x4" if ON_GPU else "resnet20")
    parser.add_argument("--batches", default="64,256,1024,4096" if ON_GPU else "64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100 if ON_GPU else 3, help="calls per repeat")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
