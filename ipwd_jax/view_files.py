"""The files that keep a table of the teacher's answers, and the space that they need."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipwd_jax import device_memory, writers
from ipwd_jax.errors import warn
from ipwd_jax.progress import Progress, duration

_FLUSH_SECONDS = 60.0
_DRAWN_TABLES = 3  # tables of drawn views that are kept beside a teacher


def shortage(files: "TableFiles", needed: int, in_memory: int) -> str:
    """Return a description of what is lacking for a table; empty if it fits.

    Args:
        files: of the table.
        needed: bytes that it takes on the disk.
        in_memory: bytes that it takes on each device.
    """
    folder = files.table.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror or error}"
    if not (files.complete() or os.access(folder, os.W_OK)):
        return f"{folder} is not writable"
    free = shutil.disk_usage(folder).free + files.replaceable()
    if not files.complete() and needed > 0.9 * free:
        return (
            f"it needs {_mib(needed)}, but can use at most 90 % of the {_mib(free)} that are free "
            f"in {folder}"
        )
    free = device_memory.available()
    if in_memory > 0.6 * free:
        return (
            f"it needs {_mib(in_memory)}, but can use at most 60 % of the {_mib(free)} that are "
            "free on the device"
        )
    return ""


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _size_and_time(path: pathlib.Path) -> tuple[int, float]:
    """Return the size and the time of the last change of a file, which others may remove."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0.0
    return found.st_size, found.st_mtime


def _noted(note: pathlib.Path) -> dict[str, Any]:
    """Return the content of a note, with an empty identity if it is missing or damaged."""
    try:
        said = json.loads(note.read_text())
        return {**said, "identity": dict(said["identity"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"identity": {}}


class TableFiles:
    """A table on disk: the answers in one file, and beside it a note that says what they are."""

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any]):
        self.identity = json.loads(json.dumps(identity))
        name = f"{zlib.crc32(json.dumps(self.identity, sort_keys=True).encode()):08x}"
        self.table, self.note = folder / f"{name}.npy", folder / f"{name}.json"
        self._unfinished = folder / f".{name}.npy", folder / f".{name}.json"

    def _read(self, note: pathlib.Path) -> dict[str, Any]:
        """Return the content of a note; empty if it is missing, damaged or of another table."""
        said = _noted(note)
        return said if said["identity"] == self.identity else {}

    def _old(self) -> list[pathlib.Path]:
        """Return the least recently used tables of drawn views and unfinished tables.

        They make room for this table if it is built; a run that needs one again builds it again.
        """
        folder, used = self.table.parent, {}
        for note in folder.glob("[!.]*.json"):
            if _noted(note)["identity"].get("views", "all") != "all":
                used[note.with_suffix(".npy")] = _size_and_time(note)[1]
        for table in folder.glob(".*.npy"):
            used[table] = _size_and_time(table)[1]
        others = used.keys() - {self.table, self._unfinished[0]}
        return sorted(others, key=lambda table: used[table], reverse=True)[_DRAWN_TABLES - 1 :]

    def replaceable(self) -> int:
        """Return the size of the files that this table takes the place of, in bytes."""
        return sum(_size_and_time(table)[0] for table in [*self._old(), self._unfinished[0]])

    def make_room(self) -> None:
        """Remove old tables."""
        for table in self._old():
            if size := _size_and_time(table)[0]:
                print(f"Removing {table} ({_mib(size)}), which can be built again", flush=True)
            table.with_suffix(".json").unlink(missing_ok=True)
            table.unlink(missing_ok=True)

    def complete(self) -> bool:
        """Return whether the table is complete, judged by its note and its size."""
        said = self._read(self.note)
        return bool(said) and _size_and_time(self.table)[0] == said["bytes"]

    def load(self) -> np.ndarray | None:
        """Return the memory-mapped table; None if it was removed or, with a warning, is damaged."""
        said, table = self._read(self.note), None
        if not said:
            return None
        try:
            table = np.load(self.table, mmap_mode="r")
        except FileNotFoundError:
            return None  # another run has made room
        except (OSError, ValueError):
            pass  # its header is damaged
        if table is not None and _checksum(table) == said.get("checksum"):
            print(f"Reading the teacher's answers from {self.table}", flush=True)
            with contextlib.suppress(OSError):  # the folder may be read-only
                self.note.touch()  # makes it the most recently used
            return table
        warn(f"{self.table} is damaged and will be built again")
        return None

    def build(
        self, columns: int, pairs: tuple[np.ndarray, np.ndarray], asker: Callable, batch: int
    ) -> np.ndarray:
        """Ask about every pair of image and view, resuming where an earlier attempt was stopped."""
        index, view = pairs
        table_path, note_path = self._unfinished
        noted = self._read(note_path)
        done, shape = noted.get("done", 0), (len(index), columns)
        # NumPy would fill up a file that was cut off with zeros.
        if done and table_path.exists() and table_path.stat().st_size == noted.get("bytes"):
            table = np.lib.format.open_memmap(table_path, mode="r+")
        else:
            done = 0
            # A note that outlived its table would say that rows of the new one are done.
            note_path.unlink(missing_ok=True)
            table = _create(table_path, shape)
        progress = Progress(len(index), unit="view")
        started, flushed = time.monotonic(), 0.0
        while done < len(index):
            rows = slice(done, min(done + batch, len(index)))
            table[rows] = asker(index[rows], view[rows])
            done = rows.stop
            seconds = time.monotonic() - started
            if seconds - flushed > _FLUSH_SECONDS:
                table.flush()
                size = table_path.stat().st_size
                note = {"identity": self.identity, "bytes": size, "done": done}
                writers.write_json(note_path, note)
                flushed = seconds
            passing = f"teacher's answers: {done:,} of {len(index):,} views"
            progress.count(done, "teacher's answers", passing)
        progress.close()
        took = duration(time.monotonic() - started)
        print(f"Teacher's answers to {len(index):,} views computed in {took}", flush=True)
        table.flush()
        note = {
            "identity": self.identity,
            "bytes": table_path.stat().st_size,
            "seconds": time.monotonic() - started,
            "checksum": _checksum(table),
        }
        with writers.explained(self.table):
            self.note.unlink(missing_ok=True)
            os.replace(table_path, self.table)
        writers.write_json(self.note, note)
        note_path.unlink(missing_ok=True)
        return np.load(self.table, mmap_mode="r")


def _create(path: pathlib.Path, shape: tuple[int, int]) -> np.memmap:
    """Create a memory-mapped table of zeros, whose space on the disk is taken at once.

    Otherwise a disk that becomes full would end the process with SIGBUS, without a message.

    Raises:
        UserError: the file cannot be written, or there is not enough space.
    """
    with writers.explained(path):
        table = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        try:
            if hasattr(os, "posix_fallocate"):
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:  # some file systems know no such call
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink()
                raise
        return table


def _checksum(table: np.ndarray) -> str:
    crc = 0
    for first in range(0, len(table), 1 << 16):
        rows = np.ascontiguousarray(table[first : first + (1 << 16)])
        # An array is a buffer, but its type declares this only from Python 3.12 on.
        crc = zlib.crc32(rows, crc)  # type: ignore[arg-type]
    return f"{crc:08x}"
