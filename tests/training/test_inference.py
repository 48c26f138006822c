"""Answers for recordings, as rows of a table and as the lines of a CSV file."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from backbone_fixtures import experiment

from ser_ray import predict
from ser_ray.models.classifier import build
from ser_ray.training import inference
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


def test_what_is_not_finite_is_no_probability():
    """Loud recordings may overflow where others do not, as in fp16."""
    model = build(experiment("embedded/tiny-whisper", adapter={"method": "frozen"})).eval()
    forward = model.forward
    model.forward = lambda inputs, lengths: forward(inputs, lengths) + torch.tensor([[0.0], [torch.nan]])
    tones = [np.sin(np.arange(length) / 10).astype(np.float32) for length in (16_000, 24_000)]
    answers = list(inference.predict(model, [(tone, 16_000) for tone in tones]))
    assert [bool(answer.probabilities) for answer in answers] == [True, False]
    assert [answer.reason for answer in answers] == ["", inference.NOT_FINITE]
    lines = predict._FORMATS["jsonl"](answers, model.experiment.emotions)
    for line in lines.splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
