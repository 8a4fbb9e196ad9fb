"""Check whether images fit into the memory of the host."""

import contextlib
import os
import pathlib

from ipwd_jax.errors import UserError

# The folder of a container's limits in versions 2 and 1 of Linux's control groups, the files there
# with the limit and the use, and the parts of the use, in memory.stat, that give way to arrays.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


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
    for folder, limit, use, yielding in _GROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # the limit may be "max"
            group = pathlib.Path(folder)
            most, used = (int((group / name).read_text()) for name in (limit, use))
            lines = (group / "memory.stat").read_text().splitlines()
            counts = dict(line.split() for line in lines)
            found.append(most - used + sum(int(counts[name]) for name in yielding))
    return max(0, min(found))


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
