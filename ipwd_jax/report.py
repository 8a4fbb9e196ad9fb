"""What a person reads of a run's results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
}


def summary(result: Mapping[str, Any]) -> str:
    """The table at the end of a run, from what `result.json` holds, or of several seeds' runs."""
    if "seeds" in result:
        return _over_seeds(result["seeds"])
    if result.get("imported"):
        return (
            f"{result['network']}, {result['classes']} classes: {result['parameters']:,} "
            f"parameters, imported from {result['imported']['file']}"
        )
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
        values = [column.get(metric) for column in columns.values()]
        if any(value is not None for value in values):
            cells = (f"{'' if v is None else format(v, '.3f'):>20}" for v in values)
            lines.append("".join([f"{metric:<15}", *cells, f"  {unit}".rstrip()]))
    rounding = result.get("teacher") or {}
    if "logits_error" in rounding:
        lines.append(
            f"teacher's logits in the step: {100 * rounding['logits_error']:.3g} % off float32's, "
            f"{100 * rounding['same_class']:.1f} % with the same class"
        )
    weights = result.get("weights")
    if weights:
        lines.append(
            "weights        "
            + ", ".join(
                f"{name.removeprefix('weight_')} {weights[name]:.3f}"
                for name in ("weight_mean", "weight_min", "weight_max")
            )
            + f", effective sample size {100 * weights['weight_effective_sample_size']:.1f} %"
        )
    if weights and "mass_correlation_A" in weights:
        cells = (
            f"{ratio} {'undefined' if value is None or value != value else format(value, '+.3f')}"
            for ratio in "AB"
            for value in [weights[f"mass_correlation_{ratio}"]]
        )
        lines.append(f"rank correlation of class weight and teacher mass: {', '.join(cells)}")
    if "images_per_second" in result:
        lines.append(
            f"{result['images_per_second']:,.0f} training images/s on {result['devices']} x "
            f"{result['device']}"
        )
    return "\n".join(lines)


def _over_seeds(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean and sample deviation of each metric over the seeds."""
    first = results[0]
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [
        f"{first['network']} on {first['data']}: {first['parameters']:,} parameters, "
        f"mean and deviation over seeds {seeds}",
        f"{'test set':<15}{'last epoch':>20}{'best epoch':>20}",
    ]
    for metric, unit in _UNITS.items():
        if metric in first["last"]:
            cells = (
                f"{_mean_and_deviation([result[which][metric] for result in results]):>20}"
                for which in ("last", "best")
            )
            lines.append("".join([f"{metric:<15}", *cells, f"  {unit}".rstrip()]))
    return "\n".join(lines)


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"
