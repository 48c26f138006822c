"""Answers for recordings, as rows of a table and as the lines of a CSV file."""

from __future__ import annotations

import csv
import io

from ser_ray import predict
from ser_ray.training.inference import Answer, answer_columns

EMOTIONS = ("angry", "sad")
ANSWERS = [
    Answer("a.wav", {"angry": 1.0, "sad": 0.0}),
    Answer("b, c.wav", {}, "it is silent"),
    Answer("", {"angry": 0.25, "sad": 0.75}),
]


def test_an_answer_is_a_row():
    assert answer_columns(EMOTIONS) == ["path", "emotion", "p_angry", "p_sad", "reason"]
    assert [list(answer.row(EMOTIONS).values()) for answer in ANSWERS] == [
        ["a.wav", "angry", 1.0, 0.0, None],
        ["b, c.wav", None, None, None, "it is silent"],
        [None, "sad", 0.25, 0.75, None],
    ]


def test_csv_has_the_same_columns_and_empty_cells():
    text = predict._FORMATS["csv"](ANSWERS, EMOTIONS)
    assert text.splitlines() == [
        "path,emotion,p_angry,p_sad,reason",
        "a.wav,angry,1.0,0.0,",
        '"b, c.wav",,,,it is silent',
        ",sad,0.25,0.75,",
    ]
    assert [row["reason"] for row in csv.DictReader(io.StringIO(text))] == ["", "it is silent", ""]
