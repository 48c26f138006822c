"""Gaps as records: what cannot be tested, and Holm's correction, by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.evaluation.gaps import corrected, gap_records, holm, wins
from ser_ray.evaluation.verdicts import comparison


def test_holm_by_hand():
    """The example of textbooks at .05, p = .01, .04, .03 and .005. In order: .005 is below .05 / 4, .01 below .05 / 3,
    .03 not below .05 / 2, which ends it: two are rejected."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_his_steps_reject(p_values):
    """The procedure as published: from the smallest on, until one is not below its share of the level."""
    level, rejected = 0.05, set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if not p_values[place] * (len(p_values) - rank) < level:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(holm(p_values)) if p < level} == rejected


def records(wrong: np.ndarray) -> dict:
    """Of a model without an error against one that misses what is ``wrong``: 6 speakers of 20 utterances."""
    labels = np.arange(120) % 2
    return gap_records(labels, labels, np.where(wrong, 1 - labels, labels), [f"s{n // 20}" for n in range(120)], 2)


def test_several_comparisons_are_corrected_figure_by_figure_and_the_raw_p_stays():
    rng = np.random.default_rng(0)
    few, many, alike = (records(wrong) for wrong in (rng.random(120) < 0.05, rng.random(120) < 0.4, np.arange(120) < 0))
    assert alike["uar"] == {"difference": 0.0, "ci95": None, "p": None}
    found = corrected([few, many, alike])
    for name in ("accuracy", "uar"):
        p = [gaps[name]["p"] for gaps in (few, many)]
        assert [gaps[name]["p"] for gaps in found] == [*p, None]
        assert p[1] < p[0]
        assert [gaps[name]["p_holm"] for gaps in found] == [p[0], pytest.approx(2 * p[1]), None]
        assert {gaps[name]["comparisons"] for gaps in found} == {2}, "what cannot be tested is not counted"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert corrected([few])[0]["uar"]["p_holm"] == few["uar"]["p"]


def test_a_gap_that_the_correction_does_not_leave_is_no_win_and_both_p_are_said():
    gap = {"difference": 0.05, "ci95": [0.002, 0.098], "p": 0.04}
    assert wins(gap) == 1
    assert comparison("x", gap, "uar") == "beats x by 5.0 points UAR [0.2, 9.8], p = 0.04"
    many = gap | {"p_holm": 0.08, "comparisons": 2}
    assert wins(many) == 0
    expected = "does not beat x: +5.0 points UAR [+0.2, +9.8], p = 0.04, 0.08 corrected for 2 comparisons (Holm)"
    assert comparison("x", many, "uar") == expected
    assert wins(gap | {"difference": -0.05, "ci95": [-0.098, -0.002], "p_holm": 0.04, "comparisons": 2}) == -1


def test_what_cannot_be_tested_is_said_and_wins_nothing():
    for gap in (
        {"difference": 0.1, "ci95": None, "p": None},
        {"difference": 0.1, "ci95": [0.1, 0.1 + 1e-16], "p": 2e-16},  # as earlier versions wrote it
    ):
        assert wins(gap) == 0
        said = comparison("x", gap, "uar")
        assert said == "cannot be compared with x: the same gap for every speaker (+10.0 points UAR) cannot be tested"
