"""Sentences on the winner: the interval decides the verb, and a rounded zero has no sign."""

import pytest

from ser_ray.evaluation import verdicts
from ser_ray.evaluation.verdicts import comparison, signed


@pytest.mark.parametrize(
    ("gap", "sentence"),
    [
        ({"difference": 0.041, "ci95": [0.01, 0.072]}, "beats x by 4.1 points UAR [1.0, 7.2]"),
        ({"difference": 0.041, "ci95": [0.01, 0.072], "p": 0.004}, "beats x by 4.1 points UAR [1.0, 7.2], p = 0.004"),
        ({"difference": 0.003, "ci95": [-0.013, 0.007]}, "does not beat x: +0.3 points UAR [-1.3, +0.7]"),
        ({"difference": 0.003, "ci95": [0.0, 0.007]}, "does not beat x: +0.3 points UAR [0.0, +0.7]"),
        (
            {"difference": -0.02, "ci95": [-0.03, -0.01], "p": 0},
            "is worse than x: -2.0 points UAR [-3.0, -1.0], p < 0.001",
        ),
    ],
)
def test_the_interval_decides(gap, sentence):
    assert comparison("x", gap, "uar") == sentence


def test_zero_has_no_sign():
    assert [signed(share) for share in (0.0, -0.0004, 0.0004, 0.0006)] == ["0.0", "0.0", "0.0", "+0.1"]


def test_a_probe_of_a_part_of_train_is_said():
    assert verdicts._part_of_train("a probe", {"uar": 0.5}) == ""
    said = verdicts._part_of_train("a probe", {"train": 120_000, "fitted_on": 5918})
    assert said == "Baseline a probe: fitted on a random 5918 of 120000 train utterances, to fit memory."
