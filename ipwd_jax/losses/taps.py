"""The fields of a teacher's outputs; a term or a weighting sees only those that it declares."""

import dataclasses
from collections.abc import Collection
from typing import Any

from ipwd_jax.models.base import Outputs

# The fields of a teacher's outputs that can be declared, and what replaces those that are not.
TAPS: dict[str, Any] = {"features": (), "preact": ()}
TAPS |= dict.fromkeys(("logits", "embedding", "pre_pool", "classifier"))


def check_taps(what: str, taps: Collection[str]) -> None:
    """Raise `ValueError` unless a term or a weighting names fields of a teacher's outputs."""
    if isinstance(taps, str) or not {*taps} <= TAPS.keys():
        raise ValueError(
            f"teacher_taps of {what} must be a tuple of some of {', '.join(TAPS)}; found {taps!r}"
        )


def only_declared(outputs: Outputs | None, taps: Collection[str]) -> Outputs | None:
    """A teacher's outputs without the fields that `taps` does not name; None if it names none."""
    if outputs is None or not taps:
        return None
    unread = {name: empty for name, empty in TAPS.items() if name not in taps}
    read = dataclasses.replace(outputs, **unread)
    if outputs.strong is not None:
        read = read.with_strong(dataclasses.replace(outputs.strong, **unread))
    return read
