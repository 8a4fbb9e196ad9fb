"""List the networks: `python -m ipwd_jax.models [NAME ...]`.

Parameters and multiply-adds are counted with 100 classes and images of 32x32 pixels, or with 1,000
classes and 224x224 pixels for ImageNet networks. The multiply-adds are those of the convolutions
and of the classifier for one image, including multiplications by the zeros of the padding.
"""

import argparse
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core

from ipwd_jax import models, signals
from ipwd_jax.typing import PyTree


def multiply_adds(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass for one image of shape (H, W, channels)."""
    image = jnp.zeros((1, *image_shape))
    variables = jax.eval_shape(network.init, jax.random.key(0), image)

    def logits(variables: PyTree, image: jax.Array) -> jax.Array:
        # By its type, `apply` can also return a pair, but only does so with mutable collections.
        return cast(models.Outputs, network.apply(variables, image)).logits

    return _count(jax.make_jaxpr(logits)(variables, image).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
            total += math.prod(out) * math.prod(kernel[:3])  # kernel is HWIO, I in one group
        elif equation.primitive.name == "dot_general":
            total += math.prod(_shape(equation.invars[1]))
        total += sum(_count(inner) for inner in core.jaxprs_in_params(equation.params))
    return total


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    return variable.aval.shape  # type: ignore[attr-defined]  # only an array's aval has one


def describe(name: str) -> str:
    """A line with a network's name, parameters, multiply-adds, image size and taps."""
    small = models.create(name, classes=1).smallest_image < 32
    classes, size = (100, 32) if small else (1000, 224)
    network = models.create(name, classes)
    image = jnp.zeros((1, size, size, 3))
    outputs, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    taps = " ".join(f"{x.shape[3]}x{x.shape[1]}" for x in outputs.features)
    millions = multiply_adds(network, image.shape[1:]) / 1e6
    return (
        f"{name:20}{parameters:>12,}{millions:>12,.2f}{size:>6}  "
        f"{taps} | {outputs.embedding.shape[1]}"
    )


def main(names: Sequence[str]) -> None:
    """Print the table for the networks `names`, or for all networks if there are none."""
    print(f"{'network':20}{'parameters':>12}{'MACs (M)':>12}{'image':>6}  taps, channels x side")
    for name in names or models.NETWORKS:
        print(describe(name), flush=True)
    if not names:
        print("\nwrn_<depth>_<width> and MobileNetV2_<width> exist with other numbers, too.")


if __name__ == "__main__":
    with signals.exit_statuses(resumes=False):
        parser = argparse.ArgumentParser(prog="python -m ipwd_jax.models", description=__doc__)
        parser.add_argument("names", nargs="*", metavar="NAME", help="a network; default: all")
        main(parser.parse_args().names)
