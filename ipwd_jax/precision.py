"""Number formats of the networks: what is rounded, and what never is.

Parameters, BatchNorm statistics, softmax, losses and the optimiser are float32 whatever the
setting. It decides what convolutions and matrix products read.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

# float32: the reference. tf32: float32 numbers whose products round to 10 bits of mantissa (NVIDIA
# GPUs from 2020; elsewhere as float32). bfloat16: kernels and maps in bfloat16.
PRECISIONS = ("float32", "tf32", "bfloat16")


def of_products(precision: str) -> contextlib.AbstractContextManager:
    """Within it products are computed as `precision` says. Enter it while tracing."""
    return jax.default_matmul_precision({"float32": "highest"}.get(precision, "tensorfloat32"))


def cast(precision: str, tree: Any) -> Any:
    """Kernels and images of a pytree in the type that the networks compute in.

    Vectors, the parameters of BatchNorm and the biases, stay as they are.
    """
    if precision != "bfloat16":
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, tree)


def at_least_float32(tree: Any) -> Any:
    """A pytree whose floats of fewer bits are float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
