"""Find the tensors of a network in what a training script saved."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipwd_jax.errors import UserError

# Where training scripts keep the network's tensors in what they save.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "student", "teacher")
COUNTER = "num_batches_tracked"


def unwrap(tree: Any, key: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Find the network's tensors in what a file holds, and print which of them are left out.

    Args:
        tree: a state dict, or a dictionary with one in a usual place.
        key: of the entry that has it; empty: a usual one.

    Returns:
        Tensors by the names that the network itself gave them, and the single numbers and strings
        beside them, such as an epoch.

    Raises:
        UserError: there are no such tensors, or in several places.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"the file holds a {type(tree).__name__} instead of a state dict")
    tree = _named(tree)
    metadata = {k: v for k, x in tree.items() if (v := _scalar(x)) is not None}
    place = _place(tree, key)
    tree = _named(tree[place]) if place else tree
    tensors = {k.removeprefix("module."): np.asarray(x) for k, x in tree.items() if _is_tensor(x)}
    tensors = {k: x for k, x in tensors.items() if not k.endswith(COUNTER)}
    if any(name.startswith("backbone.") for name in tensors):
        extra = [name for name in tensors if name.startswith("proj_head.")]
        if extra:
            print(f"left out, not of the classifier: {', '.join(extra)}", flush=True)
        tensors = {k.removeprefix("backbone."): x for k, x in tensors.items() if k not in extra}
    return tensors, {k: v for k, v in metadata.items() if k not in tree}


def _named(tree: Mapping) -> dict[str, Any]:
    """The entries of `tree` that have names: those under numbers are no layer's."""
    return {name: value for name, value in tree.items() if isinstance(name, str)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _is_state_dict(value: Any) -> bool:
    """Whether it is a dictionary with the kernel of a layer among its values."""
    return isinstance(value, Mapping) and any(
        _is_tensor(x) and x.ndim > 1 for x in _named(value).values()
    )


def _place(tree: Mapping, key: str) -> str:
    """The entry of `tree` that is the state dict; empty: `tree` itself."""
    found = [name for name, value in tree.items() if _is_state_dict(value)]
    places = [name for name in ([key] if key else _WRAPPERS) if name in found]
    if len(places) == 1:
        return places[0]
    if not key and not places and _is_state_dict(tree):
        return ""
    if not found:
        entries = ", ".join(list(tree)[:20]) or "none"
        raise UserError(
            f"the file holds no state dict; its entries: {entries}. Save model.state_dict()."
        )
    what = f"no state dict under {key!r}" if key else "state dicts under other names than usual"
    raise UserError(
        f"the file holds {'several state dicts' if places else what}; "
        f"choose one with --key=NAME: {', '.join(found)}"
    )


def _scalar(value: Any) -> bool | int | float | str | None:
    """A value for `result.json`; None for one that is not a single number or a short string."""
    if _is_tensor(value):
        return value.item() if value.size == 1 and value.dtype.kind in "biuf" else None
    is_scalar = isinstance(value, bool | int | float) or (
        isinstance(value, str) and len(value) <= 200
    )
    return value if is_scalar else None
