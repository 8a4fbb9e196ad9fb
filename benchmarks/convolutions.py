"""Compare the speed of each convolution of a training step with that of PyTorch's on a CPU.

    python benchmarks/convolutions.py [--pair TEACHER,STUDENT] [--repeats N]

Each convolution runs alone: the teacher's forward, the student's forward and backward. JAX has the
flags of the profile `cpu-eigen`, unless XLA_FLAGS is set; PyTorch's images are in `channels_last`.
The fastest run counts. Prints one JSON line per shape, with how often the two networks have it and
the GFLOP/s of both frameworks (`forward`; `image` and `kernel`, for the gradients with respect to
these), and one with the milliseconds of a whole step. The machine must be idle.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend import core as jax_core

from ipwd_jax import models, xla
from ipwd_jax.state import network_shapes

WORK = ("forward", "image", "kernel")
CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The shapes of one convolution.

    Attributes:
        image: (B, H, W, C).
        kernel: (height, width, C / groups, channels of the output).
        strides: of both axes.
        padding: rows before and after, and columns before and after.
        groups: number of groups of channels.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def convolutions(name: str, batch: int, side: int) -> Iterator[Convolution]:
    """Yield the convolutions of a network, in the order in which it computes them."""
    network, shape = models.create(name, CLASSES), (side, side, 3)
    forward = jax.make_jaxpr(lambda variables, x: network.apply(variables, x).logits)
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def inside(jaxpr: Any) -> Iterator[Convolution]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                image, kernel = (variable.aval.shape for variable in equation.invars)
                settings = equation.params
                yield Convolution(
                    image,
                    kernel,
                    settings["window_strides"],
                    settings["padding"],
                    settings["feature_group_count"],
                )
            for inner in jax_core.jaxprs_in_params(equation.params):
                yield from inside(inner)

    yield from inside(forward(network_shapes(network, shape), images).jaxpr)


def ours(of: Convolution, image: np.ndarray, kernel: np.ndarray) -> dict[str, Callable]:
    """Return functions that compute the three kinds of work in JAX."""

    def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            of.strides,
            of.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=of.groups,
        )

    x, w = jnp.asarray(image), jnp.asarray(kernel)
    gradient = jnp.ones_like(convolve(x, w))
    by_image = jax.jit(lambda w, g: jax.linear_transpose(lambda x: convolve(x, w), x)(g))
    by_kernel = jax.jit(lambda x, g: jax.linear_transpose(lambda w: convolve(x, w), w)(g))
    calls = (jax.jit(convolve), x, w), (by_image, w, gradient), (by_kernel, x, gradient)
    # Arguments are bound now, not when the function is called.
    return {
        kind: lambda call=call: jax.block_until_ready(call[0](*call[1:]))
        for kind, call in zip(WORK, calls, strict=True)
    }


def theirs(of: Convolution, image: np.ndarray, kernel: np.ndarray) -> dict[str, Callable]:
    """Return functions that compute the three kinds of work in PyTorch."""
    last = {"memory_format": torch.channels_last}
    x = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(**last)
    w = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous(**last)
    settings = of.strides, [before for before, _ in of.padding], [1, 1]

    def forward() -> torch.Tensor:
        return torch.ops.aten.convolution(x, w, None, *settings, False, [0, 0], of.groups)

    gradient = torch.ones_like(forward(), **last)

    def backward(*wanted: bool) -> Callable:
        return lambda: torch.ops.aten.convolution_backward(
            gradient, x, w, None, *settings, False, [0, 0], of.groups, [*wanted, False]
        )

    return dict(zip(WORK, (forward, backward(True, False), backward(False, True)), strict=True))


def seconds(function: Callable) -> float:
    """Return how long a call of the function takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(of: Convolution, repeats: int) -> dict[str, dict[str, float]]:
    """Return the seconds of each kind of work in both frameworks."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, np.float32) for shape in (of.image, of.kernel)]
    found: dict[str, dict[str, float]] = {}
    for name, arm in {"ours": ours(of, *arrays), "torch": theirs(of, *arrays)}.items():
        time.sleep(0.3)  # PyTorch's threads spin for a while before they sleep
        found[name] = {}
        for kind, function in arm.items():
            function()
            found[name][kind] = min(seconds(function) for _ in range(repeats))
    return found


def main(arguments: argparse.Namespace) -> None:
    """Measure all convolutions of the pair and print the lines."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_FLAGS", " ".join(xla.PROFILES["cpu-eigen"]))
    of_teacher, of_student = (
        collections.Counter(convolutions(name, arguments.batch, arguments.image_size))
        for name in arguments.pair.split(",")
    )
    total = {name: collections.Counter[str]() for name in ("ours", "torch")}
    for shape in {**of_teacher, **of_student}:
        found = measure(shape, arguments.repeats)
        positions = math.prod(shape.image[:3]) // math.prod(shape.strides)
        flops = 2 * positions * math.prod(shape.kernel)
        counts = {"teacher": of_teacher[shape], "student": of_student[shape]}
        for name, times in found.items():
            total[name]["teacher"] += 1e3 * counts["teacher"] * times["forward"]
            for kind in WORK if shape.image[3] > 3 else ("forward", "kernel"):
                total[name][kind] += 1e3 * counts["student"] * times[kind]
        speeds = {
            name: {kind: round(flops / times[kind] / 1e9) for kind in WORK}
            for name, times in found.items()
        }
        facts = {"image": shape.image, "kernel": shape.kernel, "strides": shape.strides}
        print(json.dumps({**facts, **counts, **speeds}), flush=True)
    for name, parts in total.items():
        ms = {kind: round(value) for kind, value in parts.items()}
        print(json.dumps({"arm": name, "ms_per_step": round(parts.total()), **ms}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", default="resnet32x4,resnet8x4", help="TEACHER,STUDENT")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each convolution")
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())
