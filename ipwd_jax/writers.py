"""Write the files that a run leaves for people and programs to read."""

import contextlib
import csv
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ipwd_jax import __version__, parallel
from ipwd_jax.errors import UserError


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that a reader sees either the old content or the new, never a part of it.

    Of several processes that train together, the first one alone writes.

    Raises:
        UserError: the file cannot be written; its old content, if there was any, is kept.
    """
    if not parallel.is_first():
        return
    # Two commands can write the same file at the same time, such as two evaluations of a run.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to show
                temporary.unlink()
            raise


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Raise `UserError` instead of an `OSError` in a block that writes the file `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Make sure that its folder is "
            "writable and that there is free space; then run the same command again."
        ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON; numbers that JSON lacks (nan, infinities) become null, as in `plain`."""
    write_atomically(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def plain(value: Any) -> Any:
    """Return `value` as it is when read back from JSON.

    NumPy numbers become Python numbers, tuples become lists, and nan and infinities become None.
    """
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per row; the columns are all keys, in the order of their first use."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `csv_text`."""
    write_atomically(path, csv_text(rows).encode())


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Write a compressed NumPy archive."""
    data = io.BytesIO()
    # mypy takes the names of the arrays for names of other arguments.
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    write_atomically(path, data.getvalue())


def versions() -> dict[str, str]:
    """Return the versions of everything on which the numbers of a run depend."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "ipwd_jax": __version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
