"""Arrays that are expensive to compute and are kept in a file for the runs that follow."""

import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from ipwd_jax import parallel, writers
from ipwd_jax.errors import UserError, warn


def arrays(
    path: pathlib.Path, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays in a file, which is written first if it is missing or damaged.

    If it cannot be written, a warning says so.

    Args:
        path: an `.npz` file, whose name identifies everything on which the arrays depend.
        compute: returns the arrays by name. All processes call it, or none.

    Raises:
        UserError: of several processes only the first can read the file.
    """
    found = _read(path)
    if parallel.from_first(lambda: found is not None):
        if found is None:
            raise UserError(f"{path} cannot be read, but the first process read it there")
        return found
    computed = compute()
    try:
        writers.write_npz(path, **computed)
    except UserError as error:  # for example in the folder of somebody else's teacher
        warn(f"{error} Until then, it is computed anew.")
    return computed


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Return the arrays in a file; None if there is none, and with a warning if it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:  # compares the checksum of each array
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        warn(f"{path} is damaged and will be computed again")
        return None
