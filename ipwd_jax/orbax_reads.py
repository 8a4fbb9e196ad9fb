"""The exceptions that Orbax leaves behind when it reads a damaged checkpoint."""

import contextlib
import inspect
import logging
import sys
import traceback
import types
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Python from printing a traceback for each array of a checkpoint that cannot be read.

    Orbax reads all arrays at once and raises the first failure. Python prints the exceptions of the
    other reads, some of them later and from other threads, so they stay hidden after a failure.
    """
    print_unraisable, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def unraisable(raised: "sys.UnraisableHookArgs") -> None:
        closed_loop = str(raised.exc_value) == "Event loop is closed"
        unfinished = (
            inspect.iscoroutine(raised.object) and "orbax" in raised.object.cr_code.co_filename
        )
        if not (closed_loop or unfinished or _in_orbax(raised.exc_traceback)):
            print_unraisable(raised)

    def worth_logging(record: logging.LogRecord) -> bool:
        # The exceptions of TensorStore, which reads for Orbax, have no traceback.
        raised = record.exc_info
        return not raised or (raised[2] is not None and not _in_orbax(raised[2]))

    sys.unraisablehook = unraisable
    logger.addFilter(worth_logging)
    yield
    sys.unraisablehook = print_unraisable
    logger.removeFilter(worth_logging)


def _in_orbax(raised: types.TracebackType | None) -> bool:
    return any("orbax" in frame.filename for frame in traceback.extract_tb(raised))
