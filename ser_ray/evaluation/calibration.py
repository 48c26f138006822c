"""Calibration of a model's confidence: how often it is right when its confidence is, for example, 80 %."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ser_ray.evaluation.metrics import ece
from ser_ray.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram as arrays (bins,); bin i holds confidences in (i / bins, (i + 1) / bins].

    ``accuracy`` and ``confidence`` are means over a bin, NaN if it is empty.
    """

    n: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    ece: float


def reliability(predictions: Predictions, bins: int = 10) -> Reliability:
    """Bin utterances by the probability of their predicted label (Guo et al. 2017, arXiv 1706.04599, figure 1).

    Args:
        predictions: of N utterances, at least one.
        bins: the number of bins; papers usually draw ten.

    >>> said = Predictions(("a", "b"), ("u", "v"), ("c", "c"), ("s", "s"), np.array([0, 1]), np.array([[0.8, 0.2]] * 2))
    >>> diagram = reliability(said)
    >>> int(diagram.n[7]), float(diagram.accuracy[7]), round(diagram.ece, 3)
    (2, 0.5, 0.3)
    """
    confidence = predictions.probabilities.max(axis=1)
    correct = predictions.predicted == predictions.labels
    # The same edges as in `ece`, so that the plot and the ECE agree.
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
