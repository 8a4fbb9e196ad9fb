"""A plot that follows a run in a notebook."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ipwd_jax.errors import UserError
from ipwd_jax.recorder import OnEpoch


def live_plot(metrics: str | Sequence[str] = ("train_loss", "test_top1")) -> OnEpoch:
    """Show a plot below a notebook's cell and redraw it after every epoch of a run.

    Args:
        metrics: a column of `metrics.csv`, or several, each of which gets axes of its own, with a
            line for each seed.

    Returns:
        What `run` takes as `on_epoch`.

    Raises:
        UserError: IPython is not installed.

    Example:
        >>> plot = ipwd_jax.live_plot(("train_loss",))  # doctest: +SKIP
        >>> ipwd_jax.run(config, "runs/mine", on_epoch=plot)  # doctest: +SKIP
    """
    try:
        from IPython.display import Image, display
    except ImportError:
        raise UserError(
            "a live plot needs a notebook, but IPython is not installed; leave on_epoch out, or "
            "install it with pip install 'ipwd_jax[colab]'"
        ) from None
    metrics = [metrics] if isinstance(metrics, str) else metrics
    figure = Figure(figsize=(4.5 * len(metrics), 3), layout="constrained")
    axes = dict(zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True))
    seen: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    shown = display(Image(_png(figure)), display_id=True)

    def on_epoch(row: Mapping[str, Any]) -> None:
        seen[row["seed"]].append(row)
        for name, ax in axes.items():
            ax.clear()
            ax.set(xlabel="epoch", title=name)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            for seed, rows in seen.items():
                # Where an epoch was not evaluated, the line has no point.
                points = [(_number(r, rows), r[name]) for r in rows if name in r]
                epochs, values = zip(*points, strict=True) if points else ((), ())
                ax.plot(epochs, values, marker=".", label=f"seed {seed}")
            if len(seen) > 1:
                ax.legend()
        shown.update(Image(_png(figure)))

    return on_epoch


def _number(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """The number of an epoch, counted from the first stage on if that was seen."""
    before = [r["epoch"] for r in rows if r["stage"] != row["stage"] and r["step"] < row["step"]]
    return row["epoch"] + max(before, default=0)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
