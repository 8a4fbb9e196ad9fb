"""Weights of the public PyTorch implementations to and from Flax variables.

Modules carry the names of the reference, dots included, so one rule serves every network:
`params/layer1.0/conv1/kernel` is `layer1.0.conv1.weight`, `batch_stats/bn1/var` is
`bn1.running_var`. No PyTorch is needed: a state dict is a mapping from names to NumPy arrays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from ipwd_jax.errors import UserError

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# By rank: vectors, linear kernels (in, out) <-> (out, in), convolutions HWIO <-> OIHW.
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def from_torch(state_dict: Mapping[str, np.ndarray], variables: Mapping[str, Any]) -> dict:
    """Return `variables` with every array taken from `state_dict`, bit for bit, type kept.

    Args:
        state_dict: PyTorch's tensors by name. The counters `num_batches_tracked` are ignored.
        variables: {'params': ..., 'batch_stats': ...} of the network; only the names and shapes
            are read, so the tree of `jax.eval_shape` will do.

    Raises:
        UserError: tensors are missing, left over or misshapen; nothing is imported by halves.
    """
    given = {k: np.asarray(v) for k, v in state_dict.items() if "num_batches_tracked" not in k}
    wanted = traverse_util.flatten_dict(variables)
    names = {path: _torch_name(path) for path in wanted}
    shapes = {
        names[path]: tuple(leaf.shape[axis] for axis in _TO_TORCH[leaf.ndim])
        for path, leaf in wanted.items()
    }
    problems = {
        "missing": sorted(shapes.keys() - given.keys()),
        "not in the network": sorted(given.keys() - shapes.keys()),
        "wrong shape": [
            f"{name} {given[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in given and given[name].shape != shape
        ],
    }
    if any(problems.values()):
        report = "; ".join(f"{what}: {_first(found)}" for what, found in problems.items() if found)
        raise UserError(f"these weights are not of this network. {report}.")
    arrays = {path: _transpose(given[name], _FROM_TORCH) for path, name in names.items()}
    return traverse_util.unflatten_dict(arrays)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of `variables` under PyTorch's names and in its layout, bit for bit."""
    leaves = traverse_util.flatten_dict(variables)
    return {_torch_name(path): _transpose(np.asarray(x), _TO_TORCH) for path, x in leaves.items()}


def _torch_name(path: tuple[str, ...]) -> str:
    _, *modules, leaf = path
    return ".".join((*modules, _LEAVES.get(leaf, leaf)))


def _transpose(x: np.ndarray, axes_by_rank: dict[int, tuple[int, ...]]) -> np.ndarray:
    # A copy: the buffer of a JAX array may be donated, and that of a caller changed.
    return np.array(x.transpose(axes_by_rank[x.ndim]), order="C")


def _first(items: Sequence[str], n: int = 10) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return ", ".join(items[:n]) + more
