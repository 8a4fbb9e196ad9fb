"""Check whether images fit into the memory of the host."""

import contextlib
import os
import pathlib

from ipwd_jax.errors import UserError

# Memory limits of a container, in versions 2 and 1 of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available() -> int:
    """Return how many bytes new arrays can take.

    On Linux this is the available memory; elsewhere it is the memory of the machine.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    found = [os.sysconf("SC_PHYS_PAGES") * page]
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        # MemFree is too small: the page cache takes most memory, and gives way to arrays.
        found.append(int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) * 1024)
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the limit may be "max"
            found.append(int(pathlib.Path(path).read_text()))
    return min(found)


def check(what: str, needed: int, remedy: str) -> None:
    """Raise `UserError` if `needed` bytes are not available.

    Args:
        what: what needs the memory: the subject of the message, in the plural.
        needed: number of bytes.
        remedy: what the user can do about it.
    """
    free = available()
    if needed > free:
        raise UserError(
            f"{what} need {_gib(needed)} of memory, but only {_gib(free)} are available; {remedy}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
