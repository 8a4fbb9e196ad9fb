"""Closed forms of the metrics; `losses/test_golden.py` compares them with the reference."""

import numpy as np
import pytest

from ipwd_jax import metrics


def test_perfect_and_hopeless_predictions():
    labels = np.array([0, 1, 2, 3, 4, 5])
    perfect = metrics.evaluate(50 * np.eye(6), labels)
    for name, value in {"top1": 100, "top5": 100, "nll": 0, "brier": 0, "aurc": 0}.items():
        assert perfect[name] == pytest.approx(value, abs=1e-6), name
    hopeless = metrics.evaluate(-50 * np.eye(6), labels)
    assert hopeless["top1"] == hopeless["top5"] == 0
    assert hopeless["aurc"] == pytest.approx(1000) and hopeless["eaurc"] == pytest.approx(0)


def test_accuracies_of_labels_of_known_rank():
    """The labels have the ranks 0 to 9 among a thousand classes, five samples each."""
    logits, samples = np.random.default_rng(0).normal(size=(50, 1000)), np.arange(50)
    labels = np.argsort(-logits, axis=1)[samples, samples % 10]
    scores = metrics.evaluate(logits, labels)
    assert (scores["top1"], scores["top5"]) == pytest.approx((10, 50))


def test_fewer_than_five_classes():
    assert metrics.evaluate(np.eye(3), np.array([2, 0, 1]))["top5"] == 100


def test_calibration_error_puts_a_border_into_the_lower_bin():
    confidence, correct = np.array([0.5, 0.5, 0.9, 1.0]), np.array([True, False, True, True])
    assert metrics.calibration_error(confidence, correct) == pytest.approx(0.25 * 0.1)


def test_risk_coverage_by_hand():
    area, excess = metrics.risk_coverage(
        np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, True])
    )
    assert area == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert excess == pytest.approx(area - 1 / 4 / 4)


def test_group_recall_ranks_classes_by_teacher_mass():
    labels = np.repeat(np.arange(8), 2)
    logits = np.eye(8)[labels]
    logits[labels == 3] = np.eye(8)[0]  # class 3 is never recognised
    logits[1] = np.eye(8)[5]  # class 0 in half of the cases
    mass = np.array([1, 2, 3, 4, 5, 6, 7, 8.0])
    assert metrics.group_recall(logits, labels, mass) == [100, 100, 50, 75]


def test_weight_summary():
    summary = metrics.weight_summary(np.arange(1, 12, dtype=np.float32))
    assert summary["mean"] == 6 and summary["min"] == 1 and summary["max"] == 11
    assert [summary[f"decile{i}"] for i in range(1, 10)] == pytest.approx(list(range(2, 11)))
    assert summary["effective_sample_size"] == pytest.approx(66**2 / 506 / 11)
    assert metrics.weight_summary(np.full(7, 3.0))["effective_sample_size"] == pytest.approx(1)


def test_mass_correlation_is_of_class_means_and_ranks():
    labels = np.array([0, 0, 1, 2])
    weights = np.array([1.0, 5.0, 2.0, 1.5])  # class means 3, 2, 1.5
    means = metrics.class_means(weights, labels, 3)
    assert metrics.rank_correlation(means, np.array([1, 10, 11.0])) == pytest.approx(-1)
    assert metrics.rank_correlation(means, np.array([9, 2, 1.0])) == pytest.approx(1)
    assert np.isnan(metrics.rank_correlation(np.ones(3), np.array([1, 2, 3.0])))


def test_rank_correlation():
    weights, nll = np.array([1.0, 5.0, 2.0, 1.5]), np.array([0.1, 90.0, 3.0, 0.2])
    assert metrics.rank_correlation(weights, nll) == pytest.approx(1)
    assert metrics.rank_correlation(-weights, nll) == pytest.approx(-1)
    assert np.isnan(metrics.rank_correlation(np.ones(4), nll))
