"""What a run shows while it trains: a bar on a terminal or in a notebook, lines in a log file."""

import sys
import time

from tqdm.auto import tqdm

_SECONDS = 10.0  # between passing lines


def duration(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A bar that counts up to `total`, below lines that stay.

    Where the output is neither a terminal nor a notebook there is no bar, and passing lines, which
    say in words what it shows, come at most once in ten seconds.
    """

    def __init__(self, total: int, unit: str) -> None:
        in_notebook = "ipykernel" in sys.modules
        self._bar = tqdm(
            total=total,
            unit=unit,
            file=sys.stdout,
            disable=False if in_notebook else None,  # None: unless it is a terminal
            dynamic_ncols=True,
            leave=False,
            bar_format="{desc} {bar} {n_fmt}/{total_fmt} {unit}s, {remaining} left",
        )
        self._shown_at, self._title = time.monotonic(), ""

    def title(self, text: str) -> None:
        """Show lines that stay, unless they are the title that was shown last."""
        if text != self._title:
            self._title = text
            self.line(text)

    def line(self, text: str) -> None:
        """Show a line that stays."""
        self._shown_at = time.monotonic()
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def count(self, done: int, description: str, passing: str = "") -> None:
        """Move the bar to `done`, with a description before it, or show a passing line."""
        if self._bar.disable:
            if passing and time.monotonic() - self._shown_at > _SECONDS:
                self.line(passing)
            return
        if self._bar.n == 0:  # what an earlier process did says nothing of the speed of this one
            self._bar.initial = self._bar.n = done
        self._bar.set_description_str(description, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
