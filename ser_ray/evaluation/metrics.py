"""The metrics of emotion recognition, computed from a confusion matrix in plain numpy.

A confusion matrix is (K, K) counts, rows the true emotion, columns the predicted one, over the K declared emotions,
whether they occur or not. Every metric also accepts stacked matrices (..., K, K) and returns (...): the bootstrap in
`ser_ray.evaluation.intervals` evaluates thousands at once. All raise ValueError for an array that is not a confusion
matrix, and for a matrix without utterances, for which no metric is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

HEADLINE: Final = ("accuracy", "uar", "macro_f1", "weighted_f1", "kappa")
"""The metrics that every table shows, in this order."""


def confusion(labels: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Count utterances by true (row) and predicted (column) label.

    Args:
        labels: (N,) int, true labels in 0..K-1.
        predicted: (N,) int, predicted labels in 0..K-1.
        num_labels: K, the number of declared emotions.

    Returns:
        (K, K) int64.

    Raises:
        ValueError: the lengths differ, or a label is outside 0..K-1.

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), num_labels=3).tolist()
    [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    """
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if labels.shape != predicted.shape or labels.ndim != 1:
        raise ValueError(f"labels and predicted must be (N,) of the same N, not {labels.shape} and {predicted.shape}")
    for name, values in (("labels", labels), ("predicted", predicted)):
        if values.size and not 0 <= values.min() <= values.max() < num_labels:
            raise ValueError(f"{name} must be in 0..{num_labels - 1}, not in {values.min()}..{values.max()}")
    counts = np.bincount(labels * num_labels + predicted, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of utterances classified correctly: trace / sum. Also known as weighted accuracy (WA).

    >>> float(accuracy(np.array([[3, 1], [0, 4]])))
    0.875
    """
    total = _total(confusion)
    return _trace(confusion) / total


def uar(confusion: np.ndarray) -> np.ndarray:
    """Unweighted average recall: the mean recall over emotions.

    The mean is over the emotions that occur among the true labels; without utterances recall is undefined.
    Equal to scikit-learn's balanced_accuracy_score. The field's usual metric since Schuller et al. 2009, "The
    INTERSPEECH 2009 Emotion Challenge", because emotions are seldom equally frequent.

    >>> float(uar(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])))
    0.875
    """
    per_label = per_emotion(confusion)
    occurring = (per_label["n"] > 0).sum(axis=-1)
    return per_label["recall"].sum(axis=-1) / occurring


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over all declared emotions; one that neither occurs nor is predicted counts as 0.

    Equal to scikit-learn's f1_score(labels=range(K), average="macro", zero_division=0).

    >>> float(macro_f1(np.array([[2, 0], [2, 0]]))).__round__(4)
    0.3333
    """
    return per_emotion(confusion)["f1"].mean(axis=-1)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 over emotions, weighted by how often each occurs among the true labels.

    Equal to scikit-learn's f1_score(labels=range(K), average="weighted", zero_division=0).

    >>> float(weighted_f1(np.array([[2, 0], [2, 0]]))).__round__(4)
    0.3333
    """
    per_label = per_emotion(confusion)
    return (per_label["f1"] * per_label["n"]).sum(axis=-1) / _total(confusion)


def kappa(confusion: np.ndarray) -> np.ndarray:
    """Agreement beyond chance: (p_o - p_e) / (1 - p_e), with observed accuracy p_o and p_e expected from the margins.

    0 if p_e is 1 (a single emotion, true and predicted throughout): all agreement is then by chance, and the quotient
    is 0 / 0. Cohen 1960, "A coefficient of agreement for nominal scales".

    >>> float(kappa(np.array([[3, 1], [1, 3]])))
    0.5
    >>> float(kappa(np.array([[8, 0], [0, 0]])))
    0.0
    """
    # In counts rather than shares, so that the degenerate case is exact.
    total = _total(confusion)
    expected = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1)
    return _ratio(_trace(confusion) * total - expected, total * total - expected)


def per_emotion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and the count n of true utterances, each (..., K).

    F1 = 2 true positives / (true + predicted). A quotient over no utterances is 0, as in scikit-learn's
    precision_recall_fscore_support(labels=range(K), zero_division=0).

    >>> per_emotion(np.array([[3, 1], [0, 4]]))["recall"].tolist()
    [0.75, 1.0]
    """
    _total(confusion)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    occurs, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, occurs),
        "f1": _ratio(2 * correct, occurs + predicted),
        "n": occurs,
    }


def ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: sum over bins b of n_b / n * |accuracy_b - confidence_b|.

    Utterances are binned by the probability of their predicted label, in bins (i / bins, (i + 1) / bins] of equal
    width. Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, equation 3.

    Args:
        labels: (N,) int, true labels.
        probabilities: (N, K), rows sum to 1.
        bins: the number of bins.

    Returns:
        0 (confidence matches accuracy) to 1.

    Raises:
        ValueError: the shapes do not match, or there are no utterances.

    >>> ece(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(f"expected labels (N,) and probabilities (N, K), not {labels.shape} and {probabilities.shape}")
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    which = bin_of(confidence, bins)
    return float(np.abs(np.bincount(which, weights=correct - confidence)).sum() / len(labels))


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """(N,) int: the number i of the bin (i / bins, (i + 1) / bins] that a confidence is in; 0 is in the first.

    >>> bin_of(np.array([0.0, 0.5, 0.51, 1.0]), 2).tolist()
    [0, 0, 1, 1]
    """
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


_HEADLINE_FUNCTIONS: Final[dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    function.__name__: function for function in (accuracy, uar, macro_f1, weighted_f1, kappa)
}
assert tuple(_HEADLINE_FUNCTIONS) == HEADLINE


def headline(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """All `HEADLINE` metrics by name: scalars for one matrix, arrays (...) for stacked matrices (..., K, K).

    >>> {name: float(value) for name, value in headline(np.array([[3, 1], [1, 3]])).items()}
    {'accuracy': 0.75, 'uar': 0.75, 'macro_f1': 0.75, 'weighted_f1': 0.75, 'kappa': 0.5}
    """
    return {name: function(confusion) for name, function in _HEADLINE_FUNCTIONS.items()}


# -- below: how it is done


def _total(confusion: np.ndarray) -> np.ndarray:
    """(...): the number of utterances; ValueError for an array that is not a confusion matrix."""
    if confusion.ndim < 2 or confusion.shape[-1] != confusion.shape[-2]:
        raise ValueError(f"expected confusion matrices (..., K, K), not {confusion.shape}")
    total = confusion.sum(axis=(-2, -1))
    if confusion.min(initial=0) < 0 or np.any(total == 0):
        raise ValueError(
            f"expected counts of at least 0 and a sum of at least 1; the lowest count is {confusion.min(initial=0)}, "
            f"the lowest sum {np.min(total)}"
        )
    return total


def _trace(confusion: np.ndarray) -> np.ndarray:
    return np.trace(confusion, axis1=-2, axis2=-1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient, 0 where the denominator is 0."""
    quotient = np.zeros(np.shape(numerator))
    return np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) != 0)[()]
