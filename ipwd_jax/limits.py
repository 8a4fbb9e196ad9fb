"""What no setting can be, whatever it means: text that no file has as its name, and large numbers.

Text and numbers are refused before a run begins, because an operating system or a device would fail
on them later, with an error that does not name the setting.
"""

import math
from numbers import Integral

import numpy as np

from ipwd_jax.errors import UserError

_LARGEST_FLOAT, _LARGEST_INTEGER = float(np.finfo(np.float32).max), 2**31 - 1
_LONGEST_NAME = 255  # bytes of the name of a file, on the usual file systems


def is_finite(number: float) -> bool:
    """Return whether a number is finite; a whole number beyond the largest float is not."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def check_number(path: str, number: float, found: str) -> None:
    """Raise `UserError` if a finite number does not fit into the 32 bits that a device gives it.

    Args:
        path: of the setting.
        number: its value, or one of its values.
        found: what the message says was found.
    """
    largest = _LARGEST_INTEGER if isinstance(number, Integral) else _LARGEST_FLOAT
    if abs(number) > largest:
        raise UserError(f"config.{path} must fit into 32 bits, {found}")


def check_text(path: str, text: str) -> None:
    """Raise `UserError` if the text of a setting, `path`, cannot name a file, as many settings do.

    Surrogates are what Python makes of names that are not in UTF-8.
    """
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"config.{path} must be text without null and surrogate characters, found {text!r}"
        )
    if longest := [part for part in text.split("/") if len(part.encode()) > _LONGEST_NAME]:
        raise UserError(
            f"config.{path} must be shorter, because no file can have a name of more than "
            f"{_LONGEST_NAME} bytes, found {longest[0]!r}"
        )
