"""What a run leaves for people and programs to read: files, TensorBoard and a progress line."""

import csv
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from ipwd_jax import __version__


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON; numbers that JSON lacks (nan, infinities) become null, as in `plain`."""
    write_atomically(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def plain(value: Any) -> Any:
    """A value as JSON gives it back: Python's own types; None for what is undefined (nan, inf)."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one line per row; the columns are all keys, in the order of their first use."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes a compressed NumPy archive."""
    data = io.BytesIO()
    # mypy takes the names of the arrays for those of other arguments too.
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    write_atomically(path, data.getvalue())


class ProgressLine:
    """One line that is rewritten in place on a terminal and in a notebook.

    Elsewhere, as in a log file, a line is printed, at most one in `seconds` unless it is final.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float = 10.0) -> None:
        self.stream = stream or sys.stdout
        self.in_place = self.stream.isatty() or "ipykernel" in sys.modules
        self.seconds = seconds
        self._printed_at = -math.inf
        self._width = 0

    def show(self, text: str, final: bool = False) -> None:
        """Shows `text`; a final one stays."""
        if self.in_place:
            padding = " " * max(0, self._width - len(text))
            self._width = 0 if final else len(text)
            self.stream.write(f"\r{text}{padding}" + "\n" * final)
        elif final or time.monotonic() - self._printed_at >= self.seconds:
            self._printed_at = time.monotonic()
            self.stream.write(f"{text}\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "ipwd_jax": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
