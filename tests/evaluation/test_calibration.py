"""Calibration against plain loops, torch and a search over a grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.evaluation.calibration import abstention, fit_temperature, fitted, record_of, reliability
from ser_ray.evaluation.metrics import ece
from ser_ray.evaluation.predictions import Predictions, pooled


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


# -- temperature


def _logits(seed: int, n: int = 200, k: int = 4, sharpness: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is overconfident for ``sharpness`` above 1, and labels."""
    rng = np.random.default_rng(seed)
    logits_NK = 1.5 * rng.standard_normal((n, k))
    labels = np.array([rng.choice(k, p=np.exp(row) / np.exp(row).sum()) for row in logits_NK])
    return sharpness * logits_NK, labels


def _softmax(logits_NK: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(logits_NK), dim=-1).numpy()


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_the_temperature_is_that_of_a_search_over_a_grid(sharpness):
    """By torch's cross-entropy of the logits themselves."""
    logits_NK, labels = _logits(1, sharpness=sharpness)
    found = fit_temperature(_said(_softmax(logits_NK), labels))
    grid = np.geomspace(0.1, 10, 4001)
    inputs = torch.from_numpy(logits_NK)[None] / torch.from_numpy(grid)[:, None, None]
    losses = [torch.nn.functional.cross_entropy(row, torch.from_numpy(labels)) for row in inputs]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)
    assert found == pytest.approx(sharpness, rel=0.25), "the factor that made the logits too sharp"


@given(seed=st.integers(0, 1000), temperature=st.floats(0.1, 10))
def test_a_temperature_divides_the_logits_and_no_answer_changes(seed, temperature):
    logits_NK, labels = _logits(seed, n=30)
    before = _said(_softmax(logits_NK), labels)
    after = before.at_temperature(temperature)
    np.testing.assert_allclose(after.probabilities, _softmax(logits_NK / temperature), atol=1e-12)
    assert np.array_equal(after.predicted, before.predicted)
    assert before.at_temperature(1.0) is before


def test_a_model_without_a_mistake_has_the_lowest_temperature():
    assert fit_temperature(_said(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1]))) == pytest.approx(0.1, rel=1e-3)


def test_a_probability_of_zero_is_survived():
    assert np.isfinite(fit_temperature(_said(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))))


def _run(ids: str, labels: np.ndarray, probabilities: np.ndarray) -> Predictions:
    """A letter each: an utterance, and its speaker."""
    return Predictions(
        tuple("abcd"), tuple(ids), ("c",) * len(ids), tuple(f"c/{i}" for i in ids), labels, probabilities
    )


def test_a_run_is_tested_with_what_the_dev_of_others_gives():
    """Two folds, whose dev and test are swapped: that of the second must not see its own test utterances in dev."""
    logits_NK, labels = _logits(3, n=80)
    letters = "".join(chr(0x4E00 + n) for n in range(80))
    folds = [(letters[rows], labels[rows], logits_NK[rows]) for rows in (slice(0, 40), slice(40, 80))]
    dev = [_run(ids, own, _softmax(logits)) for ids, own, logits in folds]
    test = [_run(ids, own, _softmax(2 * logits)) for ids, own, logits in folds[::-1]]
    record = record_of(fitted(pooled(dev)), dev, test)
    expected = [fit_temperature(dev[0]), fit_temperature(dev[1])]
    assert abs(expected[0] - expected[1]) > 0.05
    after = pooled([part.at_temperature(t) for part, t in zip(test, expected, strict=True)])
    assert record["test"]["ece"]["after"]["value"] == pytest.approx(ece(after.labels, after.probabilities))
    assert record["test"]["ece"]["before"]["value"] == pytest.approx(
        ece(after.labels, np.concatenate([part.probabilities for part in test]))
    )
    assert record["fitted_on"] == {"utterances": 80, "speakers": 80, "runs": 2}
    assert record["dev"]["nll"]["after"] <= record["dev"]["nll"]["before"]
    low, high = record["dev"]["ece"]["after"]["ci95"]
    assert low <= record["dev"]["ece"]["after"]["value"] <= high
    assert record["dev"]["ece"]["after"]["value"] < record["dev"]["ece"]["before"]["value"]


# -- answers that are withheld


def test_answers_are_withheld_by_confidence():
    logits_NK, labels = _logits(5, n=97)
    said = _said(_softmax(logits_NK), labels)
    rows = abstention(said)
    assert [row["share"] for row in rows] == pytest.approx([n / 20 for n in range(1, 21)])
    order = sorted(range(97), key=lambda n: -max(said.probabilities[n]))
    for row in rows:
        answered = order[: int(np.ceil(round(row["share"] * 97, 9)))]
        assert row["n"] == len(answered)
        assert row["confidence"] == min(max(said.probabilities[n]) for n in answered)
        right = [said.predicted[n] == labels[n] for n in answered]
        assert row["accuracy"] == pytest.approx(np.mean(right))
        hits = {k: [hit for hit, n in zip(right, answered, strict=True) if labels[n] == k] for k in labels[answered]}
        assert row["uar"] == pytest.approx(np.mean([np.mean(own) for own in hits.values()]))
    assert rows[-1]["accuracy"] == pytest.approx(np.mean(said.predicted == labels))
