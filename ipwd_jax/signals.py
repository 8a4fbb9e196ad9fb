"""Signals that ask a run to stop: acknowledged at once, and collected for the loop to act on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ipwd_jax.errors import Interrupted, UserError


@contextlib.contextmanager
def acknowledged() -> Iterator[None]:
    """Say at once that a signal has come, even while the main thread compiles a program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_acknowledge, args=(reader,), daemon=True).start()
    previous = signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread


def _acknowledge(reader: int) -> None:
    asked = {signal.SIGINT, signal.SIGTERM}
    while number := os.read(reader, 1):
        if number[0] in asked:
            print("\nStopping; the work that is done is kept.", file=sys.stderr, flush=True)
            asked = set()
    os.close(reader)


@contextlib.contextmanager
def exit_statuses(resumes: bool = True) -> Iterator[None]:
    """End the process with one line and a status in place of a traceback.

    The status is 2 for a mistake of the user, and 128 plus the number of a signal that stopped it.
    If nothing reads the output any more, as after `| head`, it is that of SIGPIPE, without a line.

    Args:
        resumes: whether the command goes on from where it was stopped, which the line then says.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        then = "; the same command resumes from here" if resumes else ""
        print(f"\n{str(stop) or 'stopped'}{then}", file=sys.stderr)
        sys.exit(128 + number)


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in place of their usual effect, which a second one has."""
    received: list[int] = []

    def handle(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous: dict[int, Any] = {}  # handlers
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
