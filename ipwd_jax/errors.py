"""The exceptions that end a run early: a mistake of the user, or a signal to stop."""

import difflib
import signal
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A problem that the user can fix: a wrong name, value, file or directory.

    The message says what is wrong, what was found and what to do. The command line prints it
    without a traceback and exits with status 2.

    Examples:
        >>> ipwd_jax.create_model("resnet9", classes=10)
        Traceback (most recent call last):
        ipwd_jax.errors.UserError: unknown network 'resnet9'. Did you mean 'resnet8'? ...
    """


class InUse(UserError):
    """Another process is working on the same directory."""


class Interrupted(Exception):
    """A signal asked the run to stop, and everything has been saved; `signum` is its number."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def warn(text: object) -> None:
    """Print a warning on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Return a `UserError` for a `name` that is not `valid`, which suggests a similar valid one."""
    valid = sorted(valid)
    folded = {v.lower(): v for v in valid}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.8)
    near = near or [
        folded[v] for v in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid: {', '.join(valid)}." if len(valid) < 50 else ""
    return UserError(f"unknown {kind} {name!r}.{hint}{listed}")
