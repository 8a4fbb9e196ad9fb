"""Figures of a single run: its training, its confidence and its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ipwd_jax import metrics
from ipwd_jax.report import drawing
from ipwd_jax.report.analysis import BINS, Confidence, Marks, column
from ipwd_jax.report.content import Figure, one_line, short
from ipwd_jax.report.drawing import BLUE, COLOURS, GREEN, INK, LINES, VERMILLION, draw

_NETWORKS = {"student": (BLUE, "-"), "teacher": (VERMILLION, "--"), "baseline": (GREEN, "-.")}
_MANY = 20  # classes, above which a figure names only those at its ends


def accuracy(history: list[dict[str, Any]], marks: Marks, teacher: float | None) -> Figure:
    """Accuracy on the training, the test and any validation set, with the teacher's."""
    epochs = np.arange(1, len(history) + 1)
    names = {"training": "train_top1", "test": "test_top1", "validation": "validation_top1"}
    curves = {name: column(history, key) for name, key in names.items()}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    styles = {"training": (VERMILLION, "--"), "test": (BLUE, "-"), "validation": (GREEN, ":")}

    def paint(axes: Axes) -> None:
        for name, values in curves.items():
            colour, line = styles[name]
            _line(axes, epochs, values, label=name, color=colour, linestyle=line)
        if teacher is not None:
            axes.axhline(teacher, color=INK, alpha=0.7, linewidth=1, linestyle="-.")
            axes.annotate("teacher", (1, teacher), (0, -11), textcoords="offset points", fontsize=9)
        _epochs(axes, marks, "top-1 accuracy (%)")

    known = [f"{name} {_ends(values, ' %')}" for name, values in curves.items()]
    alt = f"Accuracy over {len(history)} epochs: {'; '.join(known)}."
    caption = "Accuracy on the training batches (augmented) and on held-out images."
    return Figure(draw("accuracy", alt, paint), alt, caption)


def losses(history: list[dict[str, Any]], marks: Marks) -> Figure:
    """The training loss and its terms, and the test set's cross-entropy, after each epoch."""
    keys = dict.fromkeys(key for row in history for key in row)
    names = [key for key in keys if key.startswith("train_") and key != "train_top1"]
    curves = {name.removeprefix("train_"): column(history, name) for name in names}
    curves = {"total" if name == "loss" else name: values for name, values in curves.items()}
    curves["test cross-entropy"] = column(history, "test_nll")
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    epochs = np.arange(1, len(history) + 1)
    wide = _spans_decades(np.array(list(curves.values())))

    def paint(axes: Axes) -> None:
        for number, (name, values) in enumerate(curves.items()):
            colour, style = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
            _line(axes, epochs, values, label=short(name, 18), color=colour, linestyle=style)
        if wide:
            drawing.logarithmic(axes, "y")
        _epochs(axes, marks, "loss (nats)" if not wide else "loss (nats, logarithmic)")

    alt = "Losses over the epochs: "
    alt += "; ".join(f"{name} {_ends(values)}" for name, values in curves.items()) + "."
    caption = "The weighted sum of the terms (total), each term before its weight in the sum, and "
    caption += "the cross-entropy on the test set."
    return Figure(draw("losses", alt, paint), alt, caption)


def reliability(networks: Mapping[str, Confidence]) -> Figure:
    """How often answers are right against how sure the networks are of them."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1, linestyle=":")
        _, accuracy, count = networks["student"].reliability()
        share = count / count.sum()
        centres = (np.arange(BINS) + 0.5) / BINS
        axes.bar(centres, share, 0.9 / BINS, color=INK, alpha=0.15, label="share of answers")
        for name, one in networks.items():
            mean, accuracy, _ = one.reliability()
            label = f"{name}: ECE {one.ece():.2f} %"
            colour, line = _NETWORKS[name]
            seen = np.isfinite(mean)
            axes.plot(
                mean[seen], accuracy[seen], color=colour, linestyle=line, marker="o", label=label
            )
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
        drawing.legend_below(axes, 2)

    words = ", ".join(f"{name} {one.ece():.2f} %" for name, one in networks.items())
    alt = f"Reliability diagram with {BINS} bins. Expected calibration error: {words}."
    caption = "Accuracy of the answers in each bin of confidence. On the dotted line confidence is "
    caption += "accuracy; below it the network is too sure. Grey: where the student's answers are."
    return Figure(draw("reliability", alt, paint, 3.3), alt, caption)


def risk_coverage(networks: Mapping[str, Confidence]) -> Figure:
    """Errors among the most confident answers against how many of these are taken."""

    def paint(axes: Axes) -> None:
        for name, one in networks.items():
            coverage, risk = one.risk_coverage()
            kept = np.unique(np.linspace(0, len(risk) - 1, 500).astype(int))
            colour, line = _NETWORKS[name]
            label = f"{name}: AURC {one.aurc():.2f}"
            axes.plot(
                100 * coverage[kept], 100 * risk[kept], color=colour, linestyle=line, label=label
            )
        axes.set(xlim=(0, 101), xlabel="coverage (%)", ylabel="errors (%)")
        axes.set_ylim(bottom=0)
        drawing.legend_below(axes, 2)

    words = ", ".join(f"{name} {one.aurc():.2f}" for name, one in networks.items())
    alt = f"Risk-coverage curves. Area under the curve times 1000: {words}."
    caption = "Share of errors if a network answers only the images that it is most sure of. The "
    caption += "area under the curve (AURC, times 1000) is small if it is unsure where it errs."
    return Figure(draw("coverage", alt, paint, 3.3), alt, caption)


def weight_bands(history: list[dict[str, Any]], marks: Marks) -> Figure:
    """The distribution of the weights after each epoch, as bands between its deciles."""
    epochs = np.arange(1, len(history) + 1)
    deciles = [column(history, f"weight_decile{i}") for i in range(1, 10)]
    low, high = column(history, "weight_min"), column(history, "weight_max")

    def paint(axes: Axes) -> None:
        for inner in range(4):
            axes.fill_between(
                epochs,
                deciles[inner],
                deciles[8 - inner],
                color=BLUE,
                alpha=0.2,
                linewidth=0,
                label="deciles 1 to 9" if inner == 0 else None,
            )
        _line(axes, epochs, deciles[4], label="median", color=BLUE)
        for values, label in ((low, "smallest and largest"), (high, None)):
            axes.plot(epochs, values, color=VERMILLION, linestyle="--", linewidth=1, label=label)
        if _spans_decades(np.array([low, high])):
            drawing.logarithmic(axes, "y")
        _epochs(axes, marks, "weight", columns=2)

    alt = f"Weights of the samples over the epochs: median {_ends(deciles[4])}; smallest "
    alt += f"{_ends(low)}; largest {_ends(high)}."
    caption = "Distribution of the weights of all training samples after each epoch. Each shade "
    caption += "goes from one decile to the opposite one, such as from 1 to 9."
    return Figure(draw("bands", alt, paint), alt, caption)


def weight_histogram(weights: np.ndarray) -> Figure:
    """How many training samples have which weight after the last epoch."""
    shown = weights.astype(np.float64)
    positive = shown[shown > 0]
    wide = _spans_decades(positive)
    if wide:
        edges = np.geomspace(positive.min(), positive.max(), 31)
    else:
        edges = np.linspace(shown.min(), max(shown.max(), shown.min() + 1e-3), 31)

    def paint(axes: Axes) -> None:
        axes.hist(shown, edges.tolist(), color=BLUE, alpha=0.85)
        mean = shown.mean()
        axes.axvline(mean, color=VERMILLION, linestyle="--", label=f"mean {mean:.3g}")
        if wide:
            drawing.logarithmic(axes, "x")
        axes.set(xlabel="weight", ylabel="training samples")
        drawing.legend_below(axes)

    alt = f"Histogram of the last weights of {len(weights):,} training samples: median "
    alt += f"{np.median(weights):.3g}, from {weights.min():.3g} to {weights.max():.3g}."
    caption = "Weights of the training samples when they were last seen."
    zeros = int((weights == 0).sum())
    if zeros and wide:
        caption += f" {zeros:,} of them have the weight 0, for which the axis has no place."
    return Figure(draw("histogram", alt, paint), alt, caption)


def transfer_gap(means: np.ndarray, mass: np.ndarray, names: list[str], rank: float) -> Figure:
    """The mean weight of each class against how much probability the teacher gives the class."""
    order = np.argsort(-mass, kind="stable")
    ends = [*order[:4], *order[-4:]]  # the classes that matter most are named first
    named = [*ends, *order[4:-4]] if len(order) <= _MANY else ends
    named = list(dict.fromkeys(int(label) for label in named))
    undefined = not np.isfinite(rank)
    correlation = "undefined" if undefined else f"{rank:+.3f}"

    def paint(axes: Axes) -> None:
        axes.scatter(mass, means, s=18, color=BLUE)
        axes.margins(x=0.12, y=0.1)
        points = np.stack([mass, means], axis=1)[named]
        drawing.name_points(axes, points, [one_line(names[label], 18) for label in named])
        axes.set(xlabel="teacher's mass of the class (images)", ylabel="mean weight of the class")

    first, last = names[order[0]], names[order[-1]]
    alt = f"Mean weight of {len(mass)} classes against the teacher's mass. Spearman's rank "
    alt += f"correlation: {correlation}. The teacher favours {first} most and {last} least."
    caption = "Each point is a class. Its mass is the sum of the probabilities that the teacher "
    caption += f"gives it on the training set. Spearman's rank correlation: {correlation}. "
    caption += "Names that would overlap are left out."
    return Figure(draw("gap", alt, paint), alt, caption)


def class_gains(gains: np.ndarray, groups: list[np.ndarray], names: list[str]) -> Figure:
    """The gain in recall of each class over a baseline, from the teacher's favourites down."""
    order = np.concatenate(groups)
    sizes = np.array([len(group) for group in groups])
    ends = np.cumsum(sizes)
    means = [metrics.mean_measured(gains[group]) for group in groups]

    def paint(axes: Axes) -> None:
        for number, group in enumerate(groups):
            places = np.arange(ends[number] - len(group), ends[number])
            axes.bar(places, gains[group], 0.8, color=COLOURS[number % 4], alpha=0.85)
            if len(group):
                left, right = places[0] - 0.4, places[-1] + 0.4
                axes.plot([left, right], [means[number]] * 2, color=INK, linewidth=1.6)
        axes.axhline(0, color=INK, linewidth=0.8)
        few = len(order) <= _MANY
        long = few and max(len(names[label]) for label in order) > 3
        axes.set_xticks(
            np.arange(len(order)) if few else ends - (sizes + 1) / 2,
            [names[label] for label in order] if few else [f"group {i}" for i in (1, 2, 3, 4)],
            rotation=60 if long else 0,
            ha="right" if long else "center",
            rotation_mode="anchor" if long else "default",
        )
        axes.grid(axis="x", visible=False)
        axes.set(ylabel="gain in recall (points)", xlabel="classes, most favoured first")

    words = ", ".join(f"group {i} {mean:+.2f}" for i, mean in enumerate(means, start=1))
    alt = f"Gain in recall of each class over the baseline. Mean of each group: {words} points."
    caption = "Bars are classes and lines are the means of the four groups, in the order of the "
    caption += "teacher's mass."
    return Figure(draw("gains", alt, paint, 3.3), alt, caption)


def _line(axes: Axes, epochs: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A curve through the epochs that were measured, with marks if these are few."""
    seen = np.isfinite(values)
    axes.plot(epochs[seen], values[seen], marker="o" if seen.sum() <= 15 else None, **style)


def _epochs(axes: Axes, marks: Marks, label: str, columns: int = 3) -> None:
    """The axis of epochs with its marks."""
    drawing.vertical_lines(axes, marks.drops, "learning rate falls", ":")
    drawing.vertical_lines(axes, marks.stages, "next stage", "-")
    drawing.whole_numbers(axes)
    axes.set(xlabel="epoch", ylabel=label)
    drawing.legend_below(axes, columns)


def _spans_decades(values: np.ndarray) -> bool:
    """Whether numbers of any shape, where measured, are positive and far enough apart for a log."""
    seen = values[np.isfinite(values)]
    return len(seen) > 0 and bool(seen.min() > 0 and seen.max() > 10 * seen.min())


def _ends(values: np.ndarray, unit: str = "") -> str:
    """Where a curve begins and ends, in words."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return "not measured"
    return f"from {seen[0]:.4g} to {seen[-1]:.4g}{unit}"
