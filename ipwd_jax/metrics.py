"""Metrics of a classifier, computed with NumPy in float64 from the logits of a whole test set."""

import numpy as np
import scipy.special
import scipy.stats


def evaluate(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute all scalar metrics of a prediction.

    Args:
        logits: (N, C).
        labels: (N,) integers in 0..C-1.

    Returns:
        `top1`, `top5` and `ece` in percent; `nll` in nats; `brier`, which is summed over the
        classes and lies in 0..2; `aurc` and `eaurc`, multiplied by 1000.
    """
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    confidence, correct = np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == labels
    rows = np.arange(len(labels))
    top5 = np.argpartition(-log_p, min(5, log_p.shape[1]) - 1, axis=1)[:, :5]
    onehot = np.zeros_like(log_p)
    onehot[rows, labels] = 1
    area, excess = risk_coverage(confidence, correct)
    return {
        "top1": 100 * correct.mean(),
        "top5": 100 * (top5 == labels[:, None]).any(axis=1).mean(),
        "nll": -log_p[rows, labels].mean(),
        "brier": ((np.exp(log_p) - onehot) ** 2).sum(axis=1).mean(),
        "ece": 100 * calibration_error(confidence, correct),
        "aurc": 1000 * area,
        "eaurc": 1000 * excess,
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Compute the expected calibration error over bins `(lo, hi]` of equal width.

    Guo et al., 2017, as in PS-KD's code.

    Args:
        confidence: (N,) largest probability of each sample, in (0, 1].
        correct: (N,) bool.
        bins: number of bins.

    Returns:
        `sum_b n_b / N |accuracy_b - mean confidence_b|`, in 0..1.
    """
    width = 1 / bins
    error = 0.0
    for upper in np.arange(width, 1 + width, width):
        inside = (confidence > upper - width) & (confidence <= upper)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Compute the area under the risk-coverage curve, and its excess over the best possible order.

    Geifman et al., 2019, as in PS-KD's code: the area is the risk among the k most confident
    samples, averaged over k = 1..N. The best order puts all errors last.

    Args:
        confidence: (N,) largest probability of each sample.
        correct: (N,) bool.

    Returns:
        (AURC, E-AURC), both in 0..1.
    """
    count = len(correct)
    wrong = ~correct[np.argsort(confidence, kind="stable")[::-1]]
    area = (np.cumsum(wrong) / np.arange(1, count + 1)).mean()
    errors = np.arange(1, wrong.sum() + 1)
    best = (errors / (count - len(errors) + errors)).sum() / count
    return area, area - best


def class_recall(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the share of the samples of each class that are recognised.

    Args:
        logits: (N, C).
        labels: (N,) integers.

    Returns:
        (C,) in percent; nan for a class without samples.
    """
    return 100 * class_means(logits.argmax(axis=1) == labels, labels, logits.shape[1])


def groups_by_mass(class_mass: np.ndarray) -> list[np.ndarray]:
    """Divide the classes into four equal groups, from those that the teacher favours most down.

    Niu et al., 2022, Table 1: the classes are ranked by the teacher's total predicted probability.
    """
    return np.array_split(np.argsort(-class_mass, kind="stable"), 4)


def mean_measured(values: np.ndarray) -> float:
    """Compute the mean of the finite values; nan if there are none."""
    measured = values[np.isfinite(values)]
    return float(measured.mean()) if len(measured) else float("nan")


def group_means(values: np.ndarray, class_mass: np.ndarray) -> list[float]:
    """Compute the mean of values of classes (C,), such as recalls, in each of `groups_by_mass`."""
    return [mean_measured(values[group]) for group in groups_by_mass(class_mass)]


def group_recall(logits: np.ndarray, labels: np.ndarray, class_mass: np.ndarray) -> list[float]:
    """Compute the `group_means` of the `class_recall`; the mass is that on the training set."""
    return group_means(class_recall(logits, labels), class_mass)


def weight_summary(weights: np.ndarray) -> dict[str, float]:
    """Compute the mean, extremes, deciles and effective sample size of per-sample weights.

    Args:
        weights: (N,), at least 0.

    Returns:
        `mean`, `min`, `max`, `decile1`..`decile9`, and `effective_sample_size`, which is Kish's
        `(sum w)^2 / sum w^2` as a share of N, and 0 if all weights are 0.
    """
    weights = weights.astype(np.float64)
    squares = (weights**2).sum()
    deciles = np.quantile(weights, np.arange(1, 10) / 10)
    return {
        "mean": weights.mean(),
        "min": weights.min(),
        "max": weights.max(),
        **{f"decile{i}": value for i, value in enumerate(deciles, start=1)},
        "effective_sample_size": weights.sum() ** 2 / squares / len(weights) if squares else 0.0,
    }


def class_means(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Compute the mean of values of samples, such as their weights, in each class.

    Args:
        values: (N,).
        labels: (N,) integers in 0..classes-1.
        classes: number of classes.

    Returns:
        (classes,) float64; nan for a class without samples.
    """
    count = np.bincount(labels, minlength=classes)
    total = np.bincount(labels, values.astype(np.float64), classes)
    return np.divide(total, count, out=np.full(classes, np.nan), where=count > 0)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Spearman's rank correlation of two series, both (N,); nan if one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(a, b).statistic)
