"""Reliability against a plain loop over utterances and bins."""

import numpy as np
import pytest

from ser_ray.evaluation.calibration import reliability
from ser_ray.evaluation.metrics import ece
from ser_ray.evaluation.predictions import Predictions


def _said(probabilities, labels) -> Predictions:
    n, k = probabilities.shape
    return Predictions(tuple("abcdefgh"[:k]), tuple(map(str, range(n))), ("c",) * n, ("s",) * n, labels, probabilities)


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_equals_a_loop(bins):
    rng = np.random.default_rng(bins)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=300)
    probabilities[:3] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.3, 0, 0]]  # edges of bins belong to the lower one
    labels = rng.integers(0, 4, 300)
    found = reliability(_said(probabilities, labels), bins)
    held = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        i = 0
        while row.max() > np.linspace(0, 1, bins + 1)[i + 1]:
            i += 1
        held[i].append((row.max(), row.argmax() == label))
    error = 0.0
    for i, pairs in enumerate(held):
        assert found.n[i] == len(pairs)
        if not pairs:
            assert np.isnan(found.accuracy[i])
            assert np.isnan(found.confidence[i])
            continue
        confidence, right = np.mean(pairs, axis=0)
        assert found.confidence[i] == pytest.approx(confidence)
        assert found.accuracy[i] == pytest.approx(right)
        error += len(pairs) / 300 * abs(confidence - right)
    assert found.ece == pytest.approx(error)
    assert found.ece == ece(labels, probabilities, bins)


def test_a_model_that_is_sure_and_right_is_calibrated():
    found = reliability(_said(np.eye(3), np.arange(3)))
    assert found.ece == 0
    assert found.n.tolist() == [0] * 9 + [3]
