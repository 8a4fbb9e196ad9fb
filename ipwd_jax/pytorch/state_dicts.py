"""Find the tensors of a network among everything that a training script saved."""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ipwd_jax.errors import UserError

# The entries under which training scripts save the tensors of the network.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net", "student", "teacher")
COUNTER = "num_batches_tracked"


def unwrap(tree: Any, key: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Find the network's tensors in the content of a file, and print which ones are left out.

    Args:
        tree: a state dict, or a dictionary with a state dict under one of the usual keys.
        key: the key of the state dict; empty means one of the usual keys.

    Returns:
        The tensors, by the names that the network itself gave them, and the single numbers and
        strings that were saved beside them, such as an epoch.

    Raises:
        UserError: there is no state dict, or there are several.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"the file holds a {type(tree).__name__} instead of a state dict")
    tree = _named(tree)
    metadata = {k: v for k, x in tree.items() if (v := _scalar(x)) is not None}
    place = _place(tree, key)
    tree = _named(tree[place]) if place else tree
    plain = [_plain(name) for name, value in tree.items() if isinstance(value, np.ndarray)]
    if twice := [name for name, count in collections.Counter(plain).items() if count > 1]:
        raise UserError(
            f"the file has the tensor {twice[0]!r} twice, with and without a prefix such as "
            "'module.'; save one of the two networks"
        )
    tensors = {_plain(k): np.asarray(x) for k, x in tree.items() if isinstance(x, np.ndarray)}
    tensors = {k: x for k, x in tensors.items() if not k.endswith(COUNTER)}
    if any(name.startswith("backbone.") for name in tensors):
        extra = [name for name in tensors if name.startswith("proj_head.")]
        if extra:
            print(f"not part of the classifier, left out: {', '.join(extra)}", flush=True)
        tensors = {k.removeprefix("backbone."): x for k, x in tensors.items() if k not in extra}
    return tensors, {k: v for k, v in metadata.items() if k not in tree}


def _plain(name: str) -> str:
    """Return a tensor's name without the prefixes of DataParallel and `torch.compile`."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def _named(tree: Mapping) -> dict[str, Any]:
    """Return the entries of `tree` whose keys are strings, as the names of layers are."""
    return {name: value for name, value in tree.items() if isinstance(name, str)}


def _is_state_dict(value: Any) -> bool:
    """Return whether `value` is a dictionary that holds the kernel of a layer."""
    return isinstance(value, Mapping) and any(
        isinstance(x, np.ndarray) and x.ndim > 1 for x in _named(value).values()
    )


def _place(tree: Mapping, key: str) -> str:
    """Return the key of the state dict in `tree`; empty if `tree` itself is the state dict."""
    found = [name for name, value in tree.items() if _is_state_dict(value)]
    places = [name for name in ([key] if key else _WRAPPERS) if name in found]
    if len(places) == 1:
        return places[0]
    if not key and not places and _is_state_dict(tree):
        return ""
    if not found:
        entries = ", ".join(list(tree)[:20]) or "none"
        raise UserError(
            f"the file holds no state dict; its entries are: {entries}. In PyTorch, save "
            "model.state_dict()."
        )
    what = f"no state dict under {key!r}" if key else "state dicts under unusual names only"
    raise UserError(
        f"the file holds {'several state dicts' if places else what}; "
        f"import one of these with `ipwd-jax import FILE --key=NAME`: {', '.join(found)}"
    )


def _scalar(value: Any) -> bool | int | float | str | None:
    """Return a single number or a short string for `result.json`, and None for anything else."""
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 and value.dtype.kind in "biuf" else None
    is_scalar = isinstance(value, bool | int | float) or (
        isinstance(value, str) and len(value) <= 200
    )
    return value if is_scalar else None
