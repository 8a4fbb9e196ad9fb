"""Convert weights between the public PyTorch implementations and Flax variables.

Modules carry the names of the reference implementations, dots included, so one rule serves every
network: `params/layer1.0/conv1/kernel` corresponds to `layer1.0.conv1.weight`, and
`batch_stats/bn1/var` to `bn1.running_var`. PyTorch is not needed, because a state dict is a mapping
from names to NumPy arrays.
"""

from collections.abc import Mapping, Sequence

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
    shapes, wanted = {name: x.shape for name, x in given.items()}, torch_shapes(variables)
    if shapes != wanted:
        raise UserError(differences(shapes, wanted))
    arrays = {}
    for path in traverse_util.flatten_dict(variables):
        x = given[_torch_name(path)]
        back = sorted(range(x.ndim), key=_axes(path, x.ndim).__getitem__)
        arrays[path] = _transposed(x, back)
    return traverse_util.unflatten_dict(arrays)


def torch_shapes(variables: Mapping[str, PyTree]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `variables` (arrays, or the result of `jax.eval_shape`) in PyTorch."""
    leaves = traverse_util.flatten_dict(variables)
    return {
        _torch_name(path): tuple(leaf.shape[axis] for axis in _axes(path, len(leaf.shape)))
        for path, leaf in leaves.items()
    }


def to_torch(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """Return the arrays of `variables` under PyTorch's names and in its layout, bit for bit."""
    leaves = traverse_util.flatten_dict(variables)
    return {
        _torch_name(path): _transposed(np.asarray(x), _axes(path, np.ndim(x)))
        for path, x in leaves.items()
    }


def _torch_name(path: tuple[str, ...]) -> str:
    _, *modules, leaf = path
    return ".".join((*modules, _LEAVES.get(leaf, leaf)))


def _axes(path: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """Return the axes of an array here in PyTorch's order: a kernel HWIO becomes OIHW."""
    if path[-1] != "kernel" or rank < 2:
        return tuple(range(rank))
    return (rank - 1, rank - 2, *range(rank - 2))


def _transposed(x: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    # A copy is made because the buffer of a JAX array can be donated, and a caller's be changed.
    return np.array(x.transpose(axes), order="C")


def differences(found: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> str:
    """Return a table of the tensors that are missing, left over or of a different shape."""
    rows = 20
    names = [n for n in (*wanted, *found) if found.get(n) != wanted.get(n)]
    if len(names) > rows:  # names of both are to be seen, for example if all have another prefix
        names = [*[n for n in names if n not in wanted][: rows // 2], *names]
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
    lines += [f"  {'  '.join(map(str.ljust, row, widths))}".rstrip() for row in table]
    if len(names) > rows:
        lines.append(f"  and {len(names) - rows} more")
    return "these weights do not belong to this network: " + "\n".join(lines)
