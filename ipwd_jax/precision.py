"""The number formats of the networks: what is rounded, and what never is.

Parameters, BatchNorm statistics, softmax, losses and the optimiser are in float32 whatever the
setting. The setting decides the format of the numbers that convolutions and matrix products read.
"""

import contextlib

import jax
import jax.numpy as jnp

from ipwd_jax.typing import PyTree

# float32: the reference.
# tf32: NVIDIA GPUs from 2020 on round the float32 inputs of products to 10 bits of mantissa; on all
#   other devices, it is the same as float32.
# bfloat16: kernels and maps are bfloat16; products of float32 numbers are computed as with tf32.
PRECISIONS = ("float32", "tf32", "bfloat16")


def of_products(precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which products have this precision; it must be entered while tracing."""
    return jax.default_matmul_precision({"float32": "highest"}.get(precision, "tensorfloat32"))


def cast(precision: str, tree: PyTree) -> PyTree:
    """Cast the kernels and images of a pytree to the type in which the networks compute.

    Vectors, which are the variables of BatchNorm and the biases, are left unchanged.
    """
    if precision != "bfloat16":
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, tree)


def at_least_float32(tree: PyTree) -> PyTree:
    """Cast the floats with fewer than 32 bits in a pytree to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
