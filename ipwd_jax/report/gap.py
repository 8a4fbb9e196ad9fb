"""What several runs say about the transfer gap: who gains, and what the weights do."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from ipwd_jax import metrics
from ipwd_jax.report import drawing
from ipwd_jax.report.analysis import column
from ipwd_jax.report.content import Figure, Section, Table, short
from ipwd_jax.report.drawing import INK, draw
from ipwd_jax.report.load import Loaded
from ipwd_jax.report.methods import NOT_MEASURED, Difference, Group, Pair, difference, interval

_GROUPS = 4


def by_mass(
    key: str, data: str, groups: Sequence[Group], pairs: Sequence[Pair], to: str
) -> Section | None:
    """The recall of classes grouped by the teacher's mass, as in Table 1 of Niu et al., 2022.

    Args:
        key: of the section.
        data: name of the data set.
        groups: the runs of each method, of this data set alone.
        pairs: those for which a table is wanted.
        to: the method that the others are compared with.

    Returns:
        The section; None if no pair has runs that have noted the recall and the mass of each class.
    """
    tables, figures = [], []
    for number, pair in enumerate(pairs):
        noted = _class_recalls([one for one in groups if one.pair == pair], to)
        if to not in noted:
            continue
        recalls = {
            method: {seed: metrics.group_means(*found) for seed, found in of_seeds.items()}
            for method, of_seeds in noted.items()
        }
        rows, gains = [], {}
        for method, of_seeds in recalls.items():
            shares = [
                statistics.fmean(of_seeds[seed][i] for seed in of_seeds) for i in range(_GROUPS)
            ]
            found = [
                difference(
                    {seed: values[i] for seed, values in of_seeds.items()},
                    {seed: values[i] for seed, values in recalls[to].items()},
                )
                for i in range(_GROUPS)
            ]
            gains[method] = [one.mean if one else np.nan for one in found]
            # A group whose classes have no test images has no recall.
            texts = [f"{x:.2f}" if np.isfinite(x) else NOT_MEASURED for x in shares]
            if method != to:
                texts = [f"{a} ({interval(b)})" for a, b in zip(texts, found, strict=True)]
            rows.append([method, *texts, interval(_gain_with_mass(noted[method], noted[to]))])
        head = ["method", "most favoured", "second group", "third group", "least favoured"]
        head.append("correlation of gain and mass")
        caption = f"Recall (%) of the classes of {data} at the last epoch, {pair}; in brackets the "
        tables.append(Table(f"{caption}difference from {to}", head, rows))
        others = {
            method: found
            for method, found in gains.items()
            if method != to and np.isfinite(found).any()
        }
        if others:
            figures.append(_gains_figure(f"{key}{number}", pair, others, to))
    if not tables:
        return None
    text = [
        "The classes are ranked by the teacher's mass, which is the sum of the probabilities that "
        "it gives them on the training set, and cut into four groups of equal size. A method that "
        "closes the transfer gap gains most for the classes that the teacher favours least. Over "
        "all classes, the rank correlation (Spearman) of this gain with the teacher's mass is then "
        "negative."
    ]
    title = f"Gains of favoured and neglected classes on {data}"
    return Section(key, title, text, figures, tables=tables)


def weights(key: str, data: str, groups: Sequence[Group], pairs: Sequence[Pair]) -> Section | None:
    """The weights of the methods that weight samples: sizes, and what they correlate with.

    Args:
        key: of the section.
        data: name of the data set.
        groups: the runs of each method, of this data set alone.
        pairs: those that are reported.

    Returns:
        The section; None if no method weights its samples.
    """
    weighted = [one for one in groups if any(run.run.result.get("weights") for run in _runs(one))]
    if not weighted:
        return None
    measured: dict[str, Callable[[Loaded], float | None]] = {
        "mean": lambda run: run.run.result["weights"].get("weight_mean"),
        "smallest": lambda run: run.run.result["weights"].get("weight_min"),
        "largest": lambda run: run.run.result["weights"].get("weight_max"),
        "effective samples (%)": _effective,
        "correlation with mass": _with_mass,
        "with hardness": lambda run: run.run.result["weights"].get(
            _own("hardness", run.run.config)
        ),
    }
    rows = []
    for one in weighted:
        runs = [run for run in _runs(one) if run.run.result.get("weights")]
        cells = [_mean([get(run) for run in runs]) for get in measured.values()]
        rows.append([one.method, str(one.pair), *cells, str(len(runs))])
    caption = f"Weights of the training samples of {data} in the last epoch, means over the seeds"
    table = Table(caption, ["method", "pair", *measured, "n"], rows)
    figures = []
    for number, pair in enumerate(pairs):
        of_pair = [one for one in weighted if one.pair == pair]
        curves = {one.method: one.curves(_own("mass", one.config)) for one in of_pair}
        curves = {method: found for method, found in curves.items() if np.isfinite(found).any()}
        if curves:
            figures.append(_correlations_figure(f"{key}{number}", pair, curves))
    text = [
        "Correlations are Spearman's. That with the mass is between the mean weight of a class and "
        "the teacher's mass of the class: an inverse propensity must be negatively correlated. "
        "That with hardness is between the weight of a sample and the teacher's cross-entropy on "
        "it. The effective sample size is Kish's, as a share of the samples: few samples decide "
        "the loss if it is small."
    ]
    return Section(key, f"Weights of the samples on {data}", text, figures, tables=[table])


def _runs(one: Group) -> list[Loaded]:
    return list(one.runs.values())


def _class_recalls(
    cells: Sequence[Group], to: str
) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Method -> seed -> recall and mass of each class; runs that have not noted it are left out.

    A run without a teacher has the mass that the teacher of the same seed of `to`, or else of
    another method, gives the classes. A run with another teacher than this one is left out, because
    its groups would be of other classes.
    """
    runs = [run for one in sorted(cells, key=lambda one: one.method != to) for run in _runs(one)]
    taught = [run for run in runs if _noted(run, "teacher_mass") is not None]
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for one in cells if taught else ():
        for seed, run in one.runs.items():
            of_seed = next((other for other in taught if other.seed == seed), None)
            if of_seed and run in taught and run.taught_by != of_seed.taught_by:
                continue
            source = run if run in taught else of_seed or taught[0]
            recall, mass = _noted(run, "recall_last"), _noted(source, "teacher_mass")
            if recall is not None and mass is not None and len(recall) == len(mass) >= _GROUPS:
                found.setdefault(one.method, {})[seed] = recall, mass
    return found


def _gain_with_mass(
    ours: Mapping[int, tuple[np.ndarray, np.ndarray]],
    theirs: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> Difference | None:
    """The rank correlation over classes of the gain in recall and the mass, over common seeds."""
    correlations = {}
    for seed in ours.keys() & theirs.keys():
        gain, mass = ours[seed][0] - theirs[seed][0], ours[seed][1]
        known = np.isfinite(gain)  # a class without test images has no recall
        found = metrics.rank_correlation(gain[known], mass[known]) if known.any() else np.nan
        if np.isfinite(found):
            correlations[seed] = found
    return difference(correlations, dict.fromkeys(correlations, 0.0))


def _noted(run: Loaded, name: str) -> np.ndarray | None:
    """A column of `classes.csv`, nan where it is empty; None if it has no number."""
    numbers = column(run.classes, name)
    return None if np.isnan(numbers).all() else numbers


def _effective(run: Loaded) -> float | None:
    share = run.run.result["weights"].get("weight_effective_sample_size")
    return None if share is None else 100 * share


def _with_mass(run: Loaded) -> float | None:
    means, mass = _noted(run, "weight_mean"), _noted(run, "teacher_mass")
    found = np.nan if means is None or mass is None else metrics.rank_correlation(means, mass)
    return found if np.isfinite(found) else None


def _own(what: str, config: ConfigDict) -> str:
    """The name of a correlation of the weights that a run of this config trains with."""
    return f"{what}_correlation_{config.weighting.get('ratio', '')}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return NOT_MEASURED
    return f"{statistics.fmean(known):.3g}".replace("-", "\N{MINUS SIGN}")


def _gains_figure(key: str, pair: Pair, gains: Mapping[str, Sequence[float]], to: str) -> Figure:
    def paint(axes: Axes) -> None:
        axes.axhline(0, color=INK, linewidth=0.9)
        for number, (method, values) in enumerate(gains.items()):
            axes.plot(
                range(_GROUPS),
                values,
                marker="o",
                label=short(method),
                **drawing.line_style(number),
            )
        axes.set_xticks(range(_GROUPS), ["most\nfavoured", "second", "third", "least\nfavoured"])
        axes.set(ylabel="gain in recall (points)", title=str(pair))
        drawing.legend_below(axes, 2)

    words = "; ".join(
        f"{method} {', '.join(f'{x:+.2f}' if np.isfinite(x) else NOT_MEASURED for x in values)}"
        for method, values in gains.items()
    )
    alt = f"{pair}: difference in recall from {to}, in points, for the four groups of classes from "
    alt += f"those that the teacher favours most to those that it favours least: {words}."
    caption = f"{pair}: mean difference in recall from {to} for the classes that the teacher "
    caption += "favours most (left) to those that it favours least (right)."
    return Figure(draw(key, alt, paint, 3.2 + 0.22 * -(-len(gains) // 2)), alt, caption)


def _correlations_figure(key: str, pair: Pair, curves: Mapping[str, np.ndarray]) -> Figure:
    def paint(axes: Axes) -> None:
        axes.axhline(0, color=INK, linewidth=0.9)
        drawing.means_and_ranges(axes, [(short(m), x) for m, x in curves.items()])
        axes.set(xlabel="epoch", ylabel="rank correlation", title=str(pair), ylim=(-1.05, 1.05))
        drawing.legend_below(axes, 2)

    words = "; ".join(f"{m} {values[:, -1].mean():+.2f}" for m, values in curves.items())
    alt = f"{pair}: rank correlation of class weight and teacher's mass over the epochs; at the "
    alt += f"last one: {words}."
    caption = f"{pair}: rank correlation between the mean weight of a class and the teacher's mass "
    caption += "of the class after each epoch; the shaded band spans the seeds. An inverse "
    caption += "propensity is below 0."
    return Figure(draw(key, alt, paint, 3.0 + 0.22 * -(-len(curves) // 2)), alt, caption)
