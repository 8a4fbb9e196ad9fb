"""The tables of results that a run prints at its end."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ipwd_jax.errors import UserError

# Metric -> unit, in the order of the table.
_UNITS = {
    "top1": "%",
    "top5": "%",
    "nll": "nats",
    "brier": "",
    "ece": "%",
    "aurc": "x1000",
    "eaurc": "x1000",
    "recall_group1": "% of the classes that the teacher favours most",
    "recall_group2": "%",
    "recall_group3": "%",
    "recall_group4": "% of those that it favours least",
    "validation_top1": "% on the validation images",
}


def summary(result: Mapping[str, Any]) -> str:
    """Return the table of one run or of the runs of several seeds.

    Args:
        result: the content of `result.json`.

    Raises:
        UserError: it is empty, because the run is not finished.

    Examples:
        >>> result = ipwd_jax.load_run("runs/mine").result
        >>> "last epoch" in ipwd_jax.summary(result)
        True
    """
    if "seeds" in result:
        return _over_seeds(result["seeds"])
    if result.get("imported"):
        return (
            f"{result['network']}, {result['classes']} classes: {result['parameters']:,} "
            f"parameters, imported from {result['imported']['file']}"
        )
    if "network" not in result:
        raise UserError("the run is not finished, so there are no results to show yet")
    columns = {
        f"{name} epoch {result[name]['epoch']}": result[name]
        for name in ("last", "best")
        if result.get(name)
    }
    if result.get("teacher"):
        columns = {f"teacher {result['teacher']['network']}": result["teacher"], **columns}
    lines = [
        f"{result['network']} on {result['data']}: {result['parameters']:,} parameters, "
        f"seed {result['seed']}",
        "".join([f"{'test set':<15}", *(f"{name:>20}" for name in columns)]),
    ]
    for metric, unit in _UNITS.items():
        if any(metric in column for column in columns.values()):
            cells = (
                f"{_number(column[metric]) if metric in column else '':>20}"
                for column in columns.values()
            )
            lines.append("".join([f"{metric:<15}", *cells, f"  {unit}".rstrip()]))
    rounding = result.get("teacher") or {}
    if "logits_error" in rounding:
        lines.append(
            f"teacher's logits in the step: {100 * rounding['logits_error']:.3g} % error relative "
            f"to float32, {100 * rounding['same_class']:.1f} % with the same predicted class"
        )
    lines += _weights(result.get("weights") or {})
    if result.get("images_per_second"):
        lines.append(
            f"{result['images_per_second']:,.0f} training images/s on {result['devices']} x "
            f"{result['device']}"
        )
    return "\n".join(lines)


def _weights(weights: Mapping[str, float]) -> list[str]:
    """The lines about the weights of the samples; none if the run weights none."""
    lines = []
    if weights:
        cells = (f"{name} {weights[f'weight_{name}']:.3f}" for name in ("mean", "min", "max"))
        share = 100 * weights["weight_effective_sample_size"]
        lines.append(f"weights        {', '.join(cells)}, effective sample size {share:.1f} %")
    prefix = "mass_correlation_"
    found = {name.removeprefix(prefix): x for name, x in weights.items() if prefix in name}
    if found:
        cells = (f"{name} {_number(value, '+.3f')}" for name, value in found.items())
        lines.append(f"rank correlation of class weight and teacher mass: {', '.join(cells)}")
    return lines


def _over_seeds(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of each metric's mean and sample standard deviation over the seeds."""
    first = results[0]
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [
        f"{first['network']} on {first['data']}: {first['parameters']:,} parameters, "
        f"mean and standard deviation over seeds {seeds}",
        f"{'test set':<15}{'last epoch':>20}{'best epoch':>20}",
    ]
    for metric, unit in _UNITS.items():
        if metric in first["last"]:
            cells = (
                f"{mean_and_deviation([result[which][metric] for result in results]):>20}"
                for which in ("last", "best")
            )
            lines.append("".join([f"{metric:<15}", *cells, f"  {unit}".rstrip()]))
    return "\n".join(lines)


def _number(value: float | None, form: str = ".3f") -> str:
    """Format a number; JSON's null, NaN and infinities become `undefined`."""
    return "undefined" if value is None or not math.isfinite(value) else format(value, form)


def mean_and_deviation(values: Sequence[float | None], form: str = ".3f") -> str:
    """Return `mean +- deviation` of one value per seed, or `undefined` if any of them is."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(numbers) < len(values):
        return "undefined"
    deviation = f" +- {statistics.stdev(numbers):{form}}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):{form}}{deviation}"
