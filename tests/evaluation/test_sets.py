"""Conformal sets: the threshold against its definition by counting, and the coverage against a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.evaluation import sets
from ser_ray.evaluation.predictions import Predictions


def _said(probabilities: np.ndarray, labels: np.ndarray, speakers: int = 5) -> Predictions:
    n, k = probabilities.shape
    named = tuple(f"c/{row % speakers}" for row in range(n))
    return Predictions(tuple("abcdefgh"[:k]), tuple(map(str, range(n))), ("c",) * n, named, labels, probabilities)


def _drawn(rng: np.random.Generator, n: int, k: int = 5, spread: float = 0.6) -> Predictions:
    probabilities = rng.dirichlet(np.full(k, spread), size=n)
    shifted = 0.7 * probabilities + 0.3 / k  # not what the labels are drawn by: the model is wrong
    labels = np.array([rng.choice(k, p=row) for row in probabilities])
    return _said(shifted, labels)


@given(n=st.integers(1, 200), coverage=st.sampled_from([0.5, 0.8, 0.9, 0.95]), seed=st.integers(0, 100))
def test_the_threshold_is_the_largest_that_the_definition_allows(n, coverage, seed):
    """At least ceil((n + 1) coverage) of the n calibration utterances have their true emotion at or above it."""
    said = _drawn(np.random.default_rng(seed), n)
    true = said.probabilities[np.arange(n), said.labels]
    needed = int(np.ceil(round((n + 1) * coverage, 6)))
    found = sets.least_probability(said, coverage)
    if needed > n:
        assert found == 0
        return
    assert sum(true >= found) >= needed
    assert sum(true > found) < needed


def test_sets_of_exchangeable_utterances_hold_the_truth_as_often_as_they_say():
    """Over 400 draws of 99 calibration utterances, on 200 fresh ones each: 90 % and no more than 1 % above."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        least, fresh = sets.least_probability(_drawn(rng, 99)), _drawn(rng, 200)
        held = fresh.probabilities >= least  # the definition alone, without the most probable one
        shares.append(held[np.arange(200), fresh.labels].mean())
    assert np.mean(shares) == pytest.approx(0.9, abs=0.01)


def test_a_set_has_the_most_probable_emotion_at_least():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]])
    assert sets.in_set(probabilities, 0.45).tolist() == [[True, False, False]] * 3
    assert sets.in_set(probabilities, 0.0).all()
    assert sets.in_set(probabilities, np.array([0.3, 0.3, 0.33])).sum(axis=1).tolist() == [2, 2, 3]


def test_coverage_is_counted_overall_by_speaker_and_by_emotion():
    said = _drawn(np.random.default_rng(2), 60)
    least = np.where(np.arange(60) < 30, 0.15, 0.25)
    found = sets.coverage_of(said, least)
    held = []
    for row, threshold, label in zip(said.probabilities, least, said.labels, strict=True):
        members = {k for k, p in enumerate(row) if p >= threshold} | {max(range(5), key=row.__getitem__)}
        held.append((label in members, len(members)))
    assert found["coverage"] == pytest.approx(np.mean([hit for hit, _ in held]))
    assert found["size"] == pytest.approx(np.mean([size for _, size in held]))
    assert found["single"] == pytest.approx(np.mean([size == 1 for _, size in held]))
    assert found["ci95_unit"] == "speakers"
    assert found["ci95"][0] < found["coverage"] < found["ci95"][1]
    for name, own in found["per_speaker"].items():
        rows = [n for n, speaker in enumerate(said.speakers) if speaker == name]
        assert own == {
            "n": len(rows),
            "coverage": pytest.approx(np.mean([held[n][0] for n in rows])),
            "size": pytest.approx(np.mean([held[n][1] for n in rows])),
        }
    assert sum(own["n"] for own in found["per_emotion"].values()) == 60


def test_a_gap_is_said_with_its_cause():
    def measured(*shares: float) -> dict:
        own = {f"c/{n}": {"coverage": share} for n, share in enumerate(shares)}
        return {"coverage": float(np.mean(shares)), "per_speaker": own}

    assert sets.gap_reason(measured(0.9, 0.9), measured(0.88, 0.92)) == ""
    said = sets.gap_reason(measured(0.85, 0.95), measured(0.6, 0.8, 0.95))
    assert "87 to 93 %" in said
    assert "2 dev speakers (coverage 85 to 95 % by speaker) for 3 unheard ones (60 to 95 % by speaker)" in said
