"""Whether a model's certainty can be believed: how often it is right where it says that it is 80 % sure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ser_ray.evaluation.metrics import ece
from ser_ray.schema import Predictions


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram as numbers: a bin i holds confidences in (i / bins, (i + 1) / bins]; all are (bins,).

    ``accuracy`` and ``confidence`` (both means over a bin) are NaN where it is empty.
    """

    n: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    ece: float


def reliability(predictions: Predictions, bins: int = 10) -> Reliability:
    """Bin utterances by the probability of their predicted label (Guo et al. 2017, arXiv 1706.04599, figure 1).

    Args:
        predictions: of N utterances, at least one.
        bins: their number; ten, as papers draw them.

    >>> said = Predictions(("a", "b"), ("u", "v"), ("c", "c"), ("s", "s"), np.array([0, 1]), np.array([[0.8, 0.2]] * 2))
    >>> found = reliability(said)
    >>> int(found.n[7]), float(found.accuracy[7]), round(found.ece, 3)
    (2, 0.5, 0.3)
    """
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.predicted == predictions.labels
    # The same edges as in `ece`, so that the figure and its number agree.
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    n = np.bincount(which, minlength=bins)
    total = np.where(n, n, np.nan)
    return Reliability(
        n=n,
        accuracy=np.bincount(which, weights=correct, minlength=bins) / total,
        confidence=np.bincount(which, weights=confidence, minlength=bins) / total,
        ece=ece(predictions.labels, predictions.probabilities, bins),
    )
