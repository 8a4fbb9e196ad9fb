"""How a run ends early: by the user's mistake, or at the user's wish."""

import difflib
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend: a wrong name, value, file or directory.

    The message says what is wrong, what was found and what to do. The command line prints it
    without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """A signal asked the run to stop, and everything is saved; `signum` says which signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """A `UserError` for a `name` that is not among the `valid` ones, naming the nearest of them."""
    valid = sorted(valid)
    folded = {v.lower(): v for v in valid}
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.8)
    near = near or [
        folded[v] for v in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    ]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid: {', '.join(valid)}." if len(valid) < 50 else ""
    return UserError(f"unknown {kind} {name!r}.{hint}{listed}")
