"""Folding the BatchNorm layers of a network into its convolutions, for teachers in inference mode.

In inference mode, a BatchNorm is an affine function of each channel. Where it reads the output of a
convolution, its factor is multiplied into the kernel and its offset becomes a bias, which saves a
pass over the map. Where it reads anything else (as the first layer of a pre-activation block does),
it remains as that affine function.
"""

from collections import Counter
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen.module import InterceptorContext
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from ipwd_jax.models.base import BatchNorm, Conv, Outputs
from ipwd_jax.typing import PyTree

_Path = tuple[str, ...]


def fold(network: nn.Module, variables: PyTree, image_shape: tuple[int, ...]) -> PyTree:
    """Return the variables that `apply_folded` takes instead of `variables`.

    They are computed in float32 or better.

    Args:
        network: any network of `ipwd_jax.models`.
        variables: its parameters and running statistics.
        image_shape: (H, W, channels), with which the network is traced once.

    Returns:
        `{"params": ..., "affine": {path: {"gain": ..., "shift": ...}}}`. The parameters are those
        given, with the convolutions folded. `gain` is missing if it has been folded into a kernel.
    """
    fed_by = _convolutions_before_norms(network, variables, image_shape)
    params = traverse_util.flatten_dict(variables["params"])
    stats = traverse_util.flatten_dict(variables["batch_stats"])
    affine = {}
    for path in {path[:-1] for path in stats}:
        gain = params[*path, "scale"] / jnp.sqrt(stats[*path, "var"] + BatchNorm.eps)
        shift = params[*path, "bias"] - gain * stats[*path, "mean"]
        name, conv = "/".join(path), fed_by.get(path)
        if conv is None:
            affine[name] = {"gain": gain, "shift": shift}
            continue
        kernel = params[*conv, "kernel"]
        params[*conv, "kernel"] = kernel * gain.reshape(1, 1, 1, -1)
        if (*conv, "bias") in params:
            params[*conv, "bias"] = params[*conv, "bias"] * gain
        affine[name] = {"shift": shift}
    return {"params": traverse_util.unflatten_dict(params), "affine": affine}


def apply_folded(network: nn.Module, folded: PyTree, x: jax.Array) -> Outputs:
    """Return the same as `network.apply(variables, x)`, up to rounding.

    Args:
        network: the network that was given to `fold`.
        folded: the result of `fold`, which can be cast to another float type.
        x: (B, H, W, channels).
    """

    def without_norm(
        call: Callable, args: tuple, kwargs: dict, context: InterceptorContext
    ) -> PyTree:
        if not _is_call(context, BatchNorm):
            return call(*args, **kwargs)
        (y, *_), layer = args, folded["affine"]["/".join(context.module.path)]
        y = y * layer["gain"].astype(y.dtype).reshape(_row(y)) if "gain" in layer else y
        return y + layer["shift"].astype(y.dtype).reshape(_row(y))

    with nn.intercept_methods(without_norm):
        return cast(Outputs, network.apply({"params": folded["params"]}, x))


def _convolutions_before_norms(
    network: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> dict[_Path, _Path]:
    """Path of each BatchNorm that is the only reader of a convolution -> path of the convolution.

    A tap counts as a reader, too.
    """
    outputs: list[tuple[jax.Array, _Path]] = []  # arrays are compared by identity
    fed_by = {}

    def record(call: Callable, args: tuple, kwargs: dict, context: InterceptorContext) -> PyTree:
        path = context.module.path
        if _is_call(context, BatchNorm):
            fed_by[path] = next((conv for array, conv in outputs if array is args[0]), None)
        result = call(*args, **kwargs)
        if _is_call(context, Conv):
            result = checkpoint_name(result, "/".join(path))  # marks it in the jaxpr
            outputs.append((result, path))
        return result

    with nn.intercept_methods(record):
        images = jnp.zeros((1, *image_shape))
        jaxpr = jax.make_jaxpr(network.apply)(variables, images).jaxpr
    read = [*jaxpr.outvars, *(x for equation in jaxpr.eqns for x in equation.invars)]
    uses = Counter(x for x in read if not isinstance(x, core.Literal))
    alone = {
        equation.params["name"]
        for equation in jaxpr.eqns
        if equation.primitive.name == "name" and uses[equation.outvars[0]] == 1
    }
    return {norm: conv for norm, conv in fed_by.items() if conv and "/".join(conv) in alone}


def _is_call(context: InterceptorContext, kind: type[nn.Module]) -> bool:
    return isinstance(context.module, kind) and context.method_name == "__call__"


def _row(x: jax.Array) -> tuple[int, ...]:
    return (1,) * (x.ndim - 1) + (-1,)
