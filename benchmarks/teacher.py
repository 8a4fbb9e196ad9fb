"""How fast a teacher answers, and how far its logits are from those in float32.

    python benchmarks/teacher.py [--network resnet32x4] [--batches 64,1024] [--repeats 5]

Prints one JSON line for each precision, with BatchNorm folded and not, and each batch size: images
a second (median of the repeats), the speed in TFLOP/s, and the errors that a run reports.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from our_arm import CLASSES, make_problem
from step import ON_GPU

from ipwd_jax import models, precision
from ipwd_jax.data import augment
from ipwd_jax.models.__main__ import multiply_adds
from ipwd_jax.models.fold import apply_folded, fold
from ipwd_jax.teacher import compare


def main(options: argparse.Namespace) -> None:
    """Times all combinations."""
    sizes = [int(size) for size in options.batches.split(",")]
    problem = make_problem((options.network, "resnet8"), 1, size=max(sizes))
    network, variables = models.create(options.network, CLASSES), problem.variables["teacher"]
    shape = problem.images.shape[1:]
    folded = jax.device_put(fold(network, variables, shape))
    forms = {False: (network.apply, jax.device_put(variables))}
    forms[True] = functools.partial(apply_folded, network), folded
    flops = 2 * multiply_adds(network, shape)
    mean, std = jnp.asarray(problem.mean), jnp.asarray(problem.std)
    exact = None
    for rounding in precision.PRECISIONS:
        for is_folded, (apply, inputs) in forms.items():

            @jax.jit
            def logits(inputs: Any, images: jax.Array, rounding=rounding, apply=apply) -> jax.Array:
                images = augment.normalize(images, mean, std)
                with precision.of_products(rounding):
                    outputs = apply(*precision.cast(rounding, (inputs, images)))
                return precision.at_least_float32(outputs.logits)

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
                    "precision": rounding,
                    "folded": is_folded,
                    "batch": size,
                    "images_per_second": round(speed, 1),
                    "tflops": round(speed * flops / 1e12, 3),
                    **{k: float(f"{v:.3g}") for k, v in compare(answers, exact[:size]).items()},
                    "device": jax.local_devices()[0].device_kind,
                }
                print(json.dumps(line), flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet32x4" if ON_GPU else "resnet20")
    parser.add_argument("--batches", default="64,256,1024,4096" if ON_GPU else "64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100 if ON_GPU else 3, help="of a repeat")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
