"""What a model must beat: figures that need no audio."""

from __future__ import annotations

import numpy as np

from ser_ray.evaluation.metrics import confusion, headline


def chance(num_labels: int) -> dict[str, float]:
    """Headline figures expected of guessing uniformly among K equally frequent emotions.

    >>> chance(4)
    {'accuracy': 0.25, 'uar': 0.25, 'macro_f1': 0.25, 'weighted_f1': 0.25, 'kappa': 0.0}
    """
    return {name: float(value) for name, value in headline(np.ones((num_labels, num_labels))).items()}


def majority(train_labels: np.ndarray, test_labels: np.ndarray, num_labels: int) -> dict[str, float]:
    """Headline figures of always saying the most frequent emotion of train (the first of equals).

    Raises ValueError where there are no test utterances, or a label lies outside of 0..K-1.

    >>> majority(np.array([0, 0, 1]), np.array([0, 1, 1, 1]), num_labels=2)["accuracy"]
    0.25
    """
    most_frequent = np.bincount(train_labels, minlength=num_labels).argmax()
    matrix = confusion(test_labels, np.full(len(test_labels), most_frequent), num_labels)
    return {name: float(value) for name, value in headline(matrix).items()}
