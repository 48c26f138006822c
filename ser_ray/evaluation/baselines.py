"""Baselines: chance and majority class, which need no audio, and a linear SVM on features that are not trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ser_ray.evaluation.metrics import confusion, headline

SVM_C_GRID: Final = (0.0001, 0.001, 0.01, 0.1, 1.0)
"""The values of C that `linear_svm` chooses from."""
FOLDS: Final = 5
"""Folds of the cross-validation over train speakers that chooses C."""


def chance(num_labels: int) -> dict[str, float]:
    """Headline metrics expected from guessing uniformly among K equally frequent emotions.

    >>> chance(4)
    {'accuracy': 0.25, 'uar': 0.25, 'macro_f1': 0.25, 'weighted_f1': 0.25, 'kappa': 0.0}
    """
    return {name: float(value) for name, value in headline(np.ones((num_labels, num_labels))).items()}


def majority(train_labels: np.ndarray, test_labels: np.ndarray, num_labels: int) -> dict[str, float]:
    """Headline metrics of always predicting the most frequent emotion of train (ties go to the first).

    Raises ValueError if there are no test utterances, or a label is outside 0..K-1.

    >>> majority(np.array([0, 0, 1]), np.array([0, 1, 1, 1]), num_labels=2)["accuracy"]
    0.25
    """
    most_frequent = np.bincount(train_labels, minlength=num_labels).argmax()
    matrix = confusion(test_labels, np.full(len(test_labels), most_frequent), num_labels)
    return {name: float(value) for name, value in headline(matrix).items()}


def linear_svm(
    train_features_ND: np.ndarray,
    train_labels_N: np.ndarray,
    train_speakers: Sequence[str],
    test_features_MD: np.ndarray,
    num_labels: int,
) -> np.ndarray:
    """A linear SVM on standardised features, with balanced class weights; on eGeMAPS the field's traditional baseline.

    C is the value of `SVM_C_GRID` with the best UAR in cross-validation over train speakers (ties go to the smallest);
    test is not used. With only one train speaker there is no cross-validation, and C is the middle value.

    Args:
        train_features_ND: N train utterances.
        train_labels_N: int, in 0..K-1.
        train_speakers: N names.
        test_features_MD: M test utterances.
        num_labels: K, the number of declared emotions.

    Returns:
        (M, K) float64, the softmax of the margins; 0 for an emotion that train lacks. The ranking is the SVM's, but
        the values are not calibrated, so their ECE means nothing.

    Raises:
        ValueError: train has fewer than two emotions, or the features are NaN or infinite.
    """
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    middle = SVM_C_GRID[len(SVM_C_GRID) // 2]
    model = make_pipeline(StandardScaler(), LinearSVC(C=middle, class_weight="balanced", dual=False))
    if (speakers := len(set(train_speakers))) > 1:
        folds = GroupKFold(min(FOLDS, speakers))
        model = GridSearchCV(model, {"linearsvc__C": SVM_C_GRID}, scoring="balanced_accuracy", cv=folds)
        model.fit(train_features_ND, train_labels_N, groups=train_speakers)
    else:
        model.fit(train_features_ND, train_labels_N)
    margins = model.decision_function(test_features_MD)
    if margins.ndim == 1:  # scikit-learn returns one column for two classes
        margins = np.stack([-margins, margins], axis=1)
    scores = np.exp(margins - margins.max(axis=1, keepdims=True))
    return _of_all_emotions(scores / scores.sum(axis=1, keepdims=True), model.classes_, num_labels)


# -- below: how it is done


def _of_all_emotions(probabilities_MC: np.ndarray, classes_C: np.ndarray, num_labels: int) -> np.ndarray:
    """(M, K), with columns of 0 for the emotions that train lacks."""
    probabilities_MK = np.zeros((len(probabilities_MC), num_labels))
    probabilities_MK[:, classes_C] = probabilities_MC
    return probabilities_MK
