"""The plot that follows a run in a notebook."""

import math
import sys
import types

import pytest
from matplotlib.figure import Figure

import ipwd_jax


@pytest.fixture
def shown(monkeypatch):
    """The pictures that a stand-in for IPython's `display` was given, and those of updates."""
    pictures, updates = [], []

    def display(picture, display_id):
        assert display_id
        pictures.append(picture)
        return types.SimpleNamespace(update=updates.append)

    module = types.SimpleNamespace(display=display, Image=lambda data: data)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return pictures, updates


def test_lines_of_all_seeds_grow_with_every_epoch(shown, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "__init__", _remembered(Figure.__init__, figures))
    on_epoch = ipwd_jax.live_plot(("train_loss", "test_top1"))
    for epoch, loss in ((1, 0.5), (2, math.nan)):
        for seed in (0, 1):
            row = {"seed": seed, "stage": "main", "epoch": epoch, "step": 3 * epoch}
            row |= {"train_loss": loss + seed}
            on_epoch(row | ({"test_top1": 90.0} if epoch == 2 else {}))
    losses, accuracies = figures[0].axes
    assert [line.get_label() for line in losses.lines] == ["seed 0", "seed 1"]
    assert [len(line.get_xdata()) for line in losses.lines] == [2, 2]
    assert losses.lines[1].get_ydata()[0] == 1.5
    assert [list(line.get_xdata()) for line in accuracies.lines] == [[2], [2]]
    pictures, updates = shown
    assert len(pictures) == 1 and len(updates) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures + updates)


def test_epochs_have_their_numbers_after_a_resumption_and_over_two_stages(shown, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "__init__", _remembered(Figure.__init__, figures))
    for stages, numbers in (
        ((("main", 5), ("main", 6)), [5, 6]),
        ((("first", 1), ("first", 2), ("main", 1)), [1, 2, 3]),
    ):
        on_epoch = ipwd_jax.live_plot(("train_loss",))
        for step, (stage, epoch) in enumerate(stages):
            row = {"seed": 0, "stage": stage, "epoch": epoch, "step": step}
            on_epoch({**row, "train_loss": 1.0})
        (axes,) = figures[-1].axes
        assert list(axes.lines[0].get_xdata()) == numbers


def _remembered(init, figures):
    def remember(self, *arguments, **options):
        figures.append(self)
        init(self, *arguments, **options)

    return remember


def test_without_a_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ipwd_jax.UserError, match="needs a notebook, but IPython is not installed"):
        ipwd_jax.live_plot()
