"""Number formats of the networks: what is rounded, and what never is.

Parameters, BatchNorm statistics, softmax, losses and the optimiser are float32 whatever the
setting, which decides the numbers that convolutions and matrix products read.
"""

import contextlib

import jax
import jax.numpy as jnp

from ipwd_jax.typing import PyTree

# float32: the reference. tf32: float32 numbers whose products round to 10 bits of mantissa (NVIDIA
# GPUs from 2020; elsewhere as float32). bfloat16: kernels and maps in bfloat16.
PRECISIONS = ("float32", "tf32", "bfloat16")


def of_products(precision: str) -> contextlib.AbstractContextManager:
    """A context in which products are computed as `precision` says; enter it while tracing."""
    return jax.default_matmul_precision({"float32": "highest"}.get(precision, "tensorfloat32"))


def cast(precision: str, tree: PyTree) -> PyTree:
    """Casts kernels and images of a pytree to the type that the networks compute in.

    Vectors, the parameters of BatchNorm and the biases, stay as they are.
    """
    if precision != "bfloat16":
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, tree)


def at_least_float32(tree: PyTree) -> PyTree:
    """Casts floats of fewer than 32 bits in a pytree to float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
