"""Which runs are seeds of one method, and how methods compare over the seeds that they share."""

import collections
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from ml_collections import ConfigDict

from ipwd_jax import config as config_lib
from ipwd_jax import workdir
from ipwd_jax.config import flat
from ipwd_jax.losses import WEIGHTINGS
from ipwd_jax.report.analysis import column
from ipwd_jax.report.content import one_line
from ipwd_jax.report.load import Loaded

NOT_MEASURED = "-"
_CONFIDENCE = 0.95
_FREE = tuple(f"{path}{end}" for path in workdir.FREE for end in ("=", "."))


def about_best(results: Sequence[dict[str, Any]]) -> str:
    """Return what chose the best epoch of runs, from their `result.json`, as a sentence."""
    validated = {"validation_top1" in result["best"] for result in results}
    if validated == {True}:
        return (
            "The best epoch is the one with the highest accuracy on validation images, which were "
            "held out of the training set"
        )
    return (
        "The best epoch is the one with the highest accuracy on the test set itself"
        f"{', except for runs with validation images' if True in validated else ''}, so its "
        "numbers are too good to be expected of other images; it is shown for comparison with "
        "papers that report it"
    )


@dataclasses.dataclass(frozen=True)
class Pair:
    """A column of the table: a data set, a teacher (empty: none) and a student."""

    data: str
    teacher: str
    student: str

    def __str__(self) -> str:
        return f"{self.teacher} → {self.student}" if self.teacher else f"{self.student} alone"


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        method: name of the method, the same for all pairs.
        pair: data and networks.
        runs: by seed.
    """

    method: str
    pair: Pair
    runs: dict[int, Loaded]

    def values(self, epoch: str) -> dict[int, float]:
        """Seed -> the top-1 accuracy of the "last" or "best" epoch."""
        return {seed: one.run.result[epoch]["top1"] for seed, one in self.runs.items()}

    def curves(self, name: str) -> np.ndarray:
        """(seeds, epochs) a column of `metrics.csv`, as far as all seeds have noted it."""
        found = [column(run.history, name) for run in self.runs.values() if run.history]
        length = min((len(curve) for curve in found), default=0)
        return np.array([curve[:length] for curve in found]).reshape(len(found), length)

    @property
    def config(self) -> ConfigDict:
        """The settings, with the seed of one of the runs."""
        return next(iter(self.runs.values())).run.config


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much better a method is than another, over the n seeds that both have.

    Attributes:
        mean: of the differences, in points.
        low: end of its 95 % confidence interval by Student's t; None if n is 1.
        high: the other end.
        n: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def group(runs: Sequence[Loaded]) -> tuple[list[Group], list[str]]:
    """Put together the runs that differ in their seed alone.

    Args:
        runs: finished runs.

    Returns:
        The groups in the order of their first run, and sentences about runs that were left out or
        that a reader should know more of.
    """
    problems: list[str] = []
    names = _data_names(runs)
    found: dict[tuple[Pair, str], dict[int, Loaded]] = collections.defaultdict(dict)
    for one in runs:
        pair = Pair(names[_data_key(one)], one.teacher, one.student)
        there = found[pair, _identity(one)]
        own = pair, f"{_identity(one)} {one.taught_by}"
        if own in found or (one.seed in there and there[one.seed].taught_by != one.taught_by):
            there = found[own]
        if one.seed in there:
            problems.append(
                f"{one.folder} has the same settings and seed as {there[one.seed].folder} and is "
                "left out."
            )
        else:
            there[one.seed] = one
    for seeds in found.values():
        teachers = {one.taught_by for one in seeds.values()}
        if len(teachers) > 1:
            folders = ", ".join(one.folder for one in seeds.values())
            problems.append(f"The teachers of these seeds have different parameters: {folders}.")
    return _named(found), problems


def in_every_pair(groups: Sequence[Group]) -> list[Group]:
    """The groups, those without a teacher repeated for each teacher of their student.

    A student that learns from labels alone is thus compared with what each teacher adds. Where its
    student has no teacher at all, a group stays as it is.
    """
    found = []
    for one in groups:
        pairs = dict.fromkeys(
            other.pair
            for other in groups
            if other.pair.teacher
            and (other.pair.data, other.pair.student) == (one.pair.data, one.pair.student)
        )
        places = [one.pair] if one.pair.teacher or not pairs else list(pairs)
        found += [dataclasses.replace(one, pair=pair) for pair in places]
    return found


def reference(groups: Sequence[Group], baseline: Loaded | None) -> str | None:
    """The method that the others are compared with: the baseline's, or else plain distillation.

    Returns:
        Its name; None if no group, or groups of several names, are plain distillation.
    """
    if baseline:
        folder = baseline.run.workdir.resolve()
        wanted = [g for g in groups for r in g.runs.values() if r.run.workdir.resolve() == folder]
    else:
        wanted = [one for one in groups if _is_plain_distillation(one.config)]
    names = {one.method for one in wanted}
    return names.pop() if len(names) == 1 else None


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """The paired difference of two methods over their common seeds; None if they share none.

    A seed whose difference is not finite, because one of its runs lacks the number, is left out.
    """
    found = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    differences = [x for x in found if math.isfinite(x)]
    if not differences:
        return None
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Difference(mean, None, None, n)
    quantile = float(scipy.stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1))
    half = quantile * statistics.stdev(differences) / n**0.5
    return Difference(mean, mean - half, mean + half, n)


def interval(found: Difference | None) -> str:
    """A difference with its confidence interval and number of seeds."""
    if found is None:
        return NOT_MEASURED
    ends = "" if found.low is None else f" [{signed(found.low)}, {signed(found.high)}]"
    return f"{signed(found.mean)}{ends} (n={found.n})"


def signed(value: float | None) -> str:
    """A number of points with its sign."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def changes(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Return the settings in which `config` differs from `other`, but not the name and seeds."""
    ours, theirs = leaves(config), leaves(other)
    return [
        f"{path}={one_line(ours.get(path, 'missing'), 60)}"
        for path in sorted(ours.keys() | theirs.keys())
        if path not in ("name", "seed", "seeds") and ours.get(path) != theirs.get(path)
    ]


def _data_key(one: Loaded) -> str:
    return one.checksums.get("data") or one.data


def _data_names(runs: Sequence[Loaded]) -> dict[str, str]:
    """Checksum of each data set -> its name, with the checksum if others have the name too."""
    names = {_data_key(one): one.data for one in runs}
    often = collections.Counter(names.values())
    return {key: name if often[name] == 1 else f"{name} ({key})" for key, name in names.items()}


def _identity(one: Loaded) -> str:
    """What the runs of a method have in common whatever their seed."""
    config = one.run.config
    if config.weighting.name in WEIGHTINGS:
        return workdir.identity(config, {})
    free = ("name=", "seed=", *_FREE)  # of a weighting that is not known here
    return json.dumps({k: v for k, v in leaves(config).items() if not f"{k}=".startswith(free)})


def _named(found: dict[tuple[Pair, str], dict[int, Loaded]]) -> list[Group]:
    """Groups with names that tell the groups of a pair apart."""
    plain = [
        Group(_method(next(iter(runs.values()))), pair, dict(sorted(runs.items())))
        for (pair, _), runs in found.items()
    ]
    named = []
    for one in plain:
        others = [g for g in plain if (g.pair, g.method) == (one.pair, one.method) and g is not one]
        if words := _distinguishing(one, others):
            one = dataclasses.replace(one, method=f"{one.method} ({', '.join(words)})")
        named.append(one)
    return named


def _distinguishing(one: Group, others: Sequence[Group]) -> list[str]:
    """As few settings of a group as tell it apart from each of the others."""
    words: list[str] = []
    for other in others:
        differing = [
            change for change in changes(one.config, other.config) if not change.startswith(_FREE)
        ]
        if not differing:  # the same settings with another teacher
            differing = [f"teacher {next(iter(one.runs.values())).taught_by or 'unknown'}"]
        if not {*words} & {*differing}:
            words.append(differing[0])
    return words


def _method(one: Loaded) -> str:
    """The name of a run without its data, pair and seed; its losses if it is named otherwise."""
    name = re.sub(r"_seed\d+$", "", str(one.run.config.name))
    pair = f"_{one.teacher}_{one.student}" if one.teacher else f"_{one.student}"
    method = name.removesuffix(pair)
    if method == name:
        return _described(one.run.config)
    if method == one.data:  # labels alone may have no name of their own
        return _described(one.run.config)
    if (rest := method.removeprefix(f"{one.data}_")) != method:
        return one_line(rest, 60)
    data, _, rest = method.partition("_")
    known = any(data and data in source for source in (one.data, str(one.run.config.data.name)))
    if known and not rest:
        return _described(one.run.config)
    return one_line(rest if known else method, 60)


def _described(config: ConfigDict) -> str:
    """The terms of the loss and what is weighted."""
    terms = " + ".join(
        name if weight == 1 else f"{weight:g} {name}"
        for name, weight in config.loss.items()
        if weight
    )
    weighting = config.weighting.name
    weighted = ", ".join(config.weighting.get("terms", ()))
    return one_line(terms if weighting == "uniform" else f"{terms}; {weighting} of {weighted}", 100)


def _is_plain_distillation(config: ConfigDict) -> bool:
    """Whether the loss is the labels' cross-entropy and Hinton's distillation, unweighted."""
    terms = {name for name, weight in config.loss.items() if weight}
    plain = terms == {"ce", "kd"} and config.weighting.name == "uniform"
    standardized = config.terms.get("kd", {}).get("standardize", False)
    return plain and not standardized and not config.first_stage.epochs


def leaves(config: ConfigDict) -> dict[str, Any]:
    """Path -> value of every setting, as it is when read back from JSON."""
    settings = flat(ConfigDict(config_lib.plain(config)))
    return {path: v for path, v in settings.items() if not hasattr(v, "items")}
