"""Convert weights between the public PyTorch implementations and Flax variables.

Modules carry the names of the reference implementations, dots included, so one rule serves every
network: `params/layer1.0/conv1/kernel` corresponds to `layer1.0.conv1.weight`, and
`batch_stats/bn1/var` to `bn1.running_var`. PyTorch is not needed, because a state dict is a mapping
from names to NumPy arrays.
"""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from ipwd_jax.errors import UserError
from ipwd_jax.typing import PyTree

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes by rank: vectors stay as they are, linear kernels (in, out) become (out, in), and convolution
# kernels HWIO become OIHW; and back.
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def from_torch(state_dict: Mapping[str, np.ndarray], variables: Mapping[str, PyTree]) -> dict:
    """Return a tree like `variables` whose arrays are those of `state_dict`, bit for bit.

    Args:
        state_dict: PyTorch's tensors by name. The counters `num_batches_tracked` are ignored.
        variables: {'params': ..., 'batch_stats': ...} of the network. Only names and shapes are
            read, so a tree from `jax.eval_shape` is sufficient.

    Raises:
        UserError: tensors are missing, left over or of a different shape. Nothing is imported in
            part.
    """
    given = {k: np.asarray(v) for k, v in state_dict.items() if "num_batches_tracked" not in k}
    wanted = traverse_util.flatten_dict(variables)
    check_shapes({name: x.shape for name, x in given.items()}, torch_shapes(variables))
    arrays = {path: _transpose(given[_torch_name(path)], _FROM_TORCH) for path in wanted}
    return traverse_util.unflatten_dict(arrays)


def check_shapes(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Raise `UserError` with a table of the differences unless all names and shapes are equal."""
    if found != wanted:
        raise UserError(
            f"these weights do not belong to this network: {_differences(found, wanted)}"
        )


def torch_shapes(variables: Mapping[str, PyTree]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `variables` (arrays, or the result of `jax.eval_shape`) in PyTorch."""
    leaves = traverse_util.flatten_dict(variables)
    return {
        _torch_name(path): tuple(leaf.shape[axis] for axis in _TO_TORCH[len(leaf.shape)])
        for path, leaf in leaves.items()
    }


def to_torch(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """Return the arrays of `variables` under PyTorch's names and in its layout, bit for bit."""
    leaves = traverse_util.flatten_dict(variables)
    return {_torch_name(path): _transpose(np.asarray(x), _TO_TORCH) for path, x in leaves.items()}


def _torch_name(path: tuple[str, ...]) -> str:
    _, *modules, leaf = path
    return ".".join((*modules, _LEAVES.get(leaf, leaf)))


def _transpose(x: np.ndarray, axes_by_rank: dict[int, tuple[int, ...]]) -> np.ndarray:
    # A copy is made because the buffer of a JAX array can be donated, and a caller's be changed.
    return np.array(x.transpose(axes_by_rank[x.ndim]), order="C")


def _differences(found: Mapping[str, tuple], wanted: Mapping[str, tuple], rows: int = 20) -> str:
    """Return a table of the tensors that are missing, left over or of a different shape."""
    names = [n for n in (*wanted, *found) if found.get(n) != wanted.get(n)]
    names = list(dict.fromkeys(names))
    counts = {
        "missing": sum(name not in found for name in names),
        "not in the network": sum(name not in wanted for name in names),
        "of another shape": sum(name in found and name in wanted for name in names),
    }
    table = [("tensor", "in the file", "in the network")]
    table += [(n, str(found.get(n, "-")), str(wanted.get(n, "-"))) for n in names[:rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [", ".join(f"{count} {what}" for what, count in counts.items() if count)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    if len(names) > rows:
        lines.append(f"  and {len(names) - rows} more")
    return "\n".join(lines)
