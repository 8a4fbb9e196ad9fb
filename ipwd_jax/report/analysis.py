"""The numbers behind the figures of a single run, computed by NumPy in float64."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import scipy.special

from ipwd_jax import metrics

BINS = 10  # of the reliability diagram, as in `metrics.calibration_error`


@dataclasses.dataclass(frozen=True)
class Confidence:
    """How sure a network is of its answers to N test images, and whether they are right.

    Attributes:
        confidence: (N,) largest probability.
        correct: (N,) bool.
    """

    confidence: np.ndarray
    correct: np.ndarray

    def ece(self) -> float:
        """Expected calibration error in percent."""
        return 100 * metrics.calibration_error(self.confidence, self.correct, BINS)

    def aurc(self) -> float:
        """Area under the risk-coverage curve, times 1000."""
        return 1000 * metrics.risk_coverage(self.confidence, self.correct)[0]

    def reliability(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean confidence, accuracy and number of the answers in each of `BINS` bins `(lo, hi]`.

        Each is (BINS,); the first two are in 0..1, and nan for a bin without answers.
        """
        inside = np.clip(np.ceil(self.confidence * BINS).astype(int) - 1, 0, BINS - 1)
        confidence, accuracy = (
            metrics.class_means(x, inside, BINS) for x in (self.confidence, self.correct)
        )
        return confidence, accuracy, np.bincount(inside, minlength=BINS)

    def risk_coverage(self) -> tuple[np.ndarray, np.ndarray]:
        """Coverage k / N and the share of errors among the k most confident answers, k = 1..N."""
        wrong = ~self.correct[np.argsort(self.confidence, kind="stable")[::-1]]
        taken = np.arange(1, len(wrong) + 1)
        return taken / len(wrong), np.cumsum(wrong) / taken


def confidence(logits: np.ndarray, labels: np.ndarray) -> Confidence:
    """The `Confidence` of logits (N, C) with the labels (N,)."""
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    return Confidence(np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == labels)


def column(history: list[dict[str, Any]], name: str) -> np.ndarray:
    """One metric (epochs,) of all epochs; nan where it was not measured."""
    values = [row.get(name) for row in history]
    return np.array([v if isinstance(v, float) else np.nan for v in values])


@dataclasses.dataclass(frozen=True)
class Marks:
    """What happened between the epochs of a run.

    Attributes:
        drops: after how many epochs the learning rate fell.
        stages: after how many epochs a stage ended and another began.
    """

    drops: list[int]
    stages: list[int]


def marks(history: list[dict[str, Any]], stepped: Collection[str]) -> Marks:
    """Find the steps of the learning rate and of the stages.

    Args:
        history: one row per epoch.
        stepped: the stages whose learning rate falls in steps; in others it falls all the time.
    """
    rates, names = column(history, "learning_rate"), [str(row.get("stage")) for row in history]
    later = range(1, len(history))
    stages = [i for i in later if names[i] != names[i - 1]]
    drops = [
        i
        for i in later
        if names[i] in stepped and i not in stages and rates[i] < 0.999 * rates[i - 1]
    ]
    return Marks(drops, stages)


def confusions(
    logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray
) -> list[tuple[int, int, int, int]]:
    """The ten confusions whose frequencies differ most between the student and the teacher.

    Args:
        logits: (N, C) of the student.
        teacher_logits: (N, C).
        labels: (N,).

    Returns:
        True class, predicted class, and how often the student and the teacher confuse them so.
    """
    classes = logits.shape[1]

    def count(answers: np.ndarray) -> np.ndarray:
        pairs = labels * classes + answers
        matrix = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        np.fill_diagonal(matrix, 0)
        return matrix

    student, teacher = count(logits.argmax(axis=1)), count(teacher_logits.argmax(axis=1))
    difference = np.abs(student - teacher).ravel()
    order = np.argsort(-difference, kind="stable")[:10]
    pairs = [divmod(int(flat), classes) for flat in order if difference[flat]]
    return [(i, j, int(student[i, j]), int(teacher[i, j])) for i, j in pairs]
