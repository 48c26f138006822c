"""Answers for recordings: as rows of a table, as lines, and window by window for a recording of any length."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import torch
from backbone_fixtures import experiment

from ser_ray import predict
from ser_ray.config import Audio
from ser_ray.models.classifier import build
from ser_ray.speech import audio, long, pieces
from ser_ray.training import inference
from ser_ray.training.inference import Answer, answer_columns

EMOTIONS = ("angry", "sad")
ANSWERS = [
    Answer("a.wav", {"angry": 1.0, "sad": 0.0}),
    Answer("b, c.wav", {}, "it is silent"),
    Answer("", {"angry": 0.25, "sad": 0.75}, start=1.5, end=20.0),
]
RATE = 16_000


def test_an_answer_is_a_row():
    assert answer_columns(EMOTIONS) == ["path", "start", "end", "emotion", "p_angry", "p_sad", "reason"]
    assert [list(answer.row(EMOTIONS).values()) for answer in ANSWERS] == [
        ["a.wav", None, None, "angry", 1.0, 0.0, None],
        ["b, c.wav", None, None, None, None, None, "it is silent"],
        [None, 1.5, 20.0, "sad", 0.25, 0.75, None],
    ]


def test_csv_has_the_same_columns_and_empty_cells():
    file = io.StringIO()
    predict._FORMATS["csv"](ANSWERS, EMOTIONS, file)
    assert file.getvalue().splitlines() == [
        "path,start,end,emotion,p_angry,p_sad,reason",
        "a.wav,,,angry,1.0,0.0,",
        '"b, c.wav",,,,,,it is silent',
        ",1.5,20.0,sad,0.25,0.75,",
    ]
    assert [row["reason"] for row in csv.DictReader(io.StringIO(file.getvalue()))] == ["", "it is silent", ""]


def test_an_answer_is_written_before_the_next_is_asked_for():
    file = io.StringIO()

    def answers():
        yield ANSWERS[0]
        assert "a.wav" in file.getvalue()
        yield ANSWERS[1]

    for format in ("jsonl", "csv"):
        file.truncate(0)
        predict._FORMATS[format](answers(), EMOTIONS, file)
    lines = io.StringIO()
    predict._FORMATS["jsonl"](ANSWERS, EMOTIONS, lines)
    first, second, third = map(json.loads, lines.getvalue().splitlines())
    assert first == {"path": "a.wav", "emotion": "angry", "probabilities": {"angry": 1.0, "sad": 0.0}}
    assert second["reason"] == "it is silent"
    assert (third["start"], third["end"]) == (1.5, 20.0)


@pytest.fixture(scope="module")
def model(backbones_dir):
    return build(experiment(backbones_dir / "whisper", EMOTIONS, audio=Audio(max_seconds=2.0)))


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).clip(-0.9, 0.9).astype(np.float32)


def test_a_long_recording_has_an_answer_a_window_and_one_for_the_whole(model, tmp_path):
    soundfile.write(tmp_path / "long.wav", speech(7), RATE)
    soundfile.write(tmp_path / "short.wav", speech(1, seed=1), RATE)
    answers = list(inference.predict(model, [tmp_path / "long.wav", tmp_path / "short.wav", (speech(7), RATE)]))
    assert [answer.path for answer in answers] == [str(tmp_path / "long.wav")] * 5 + [str(tmp_path / "short.wav")] + [
        ""
    ] * 5
    times = [(0.0, 1.75), (1.75, 3.5), (3.5, 5.25), (5.25, 7.0), (None, None)]
    assert [(answer.start, answer.end) for answer in answers] == [*times, (None, None), *times]
    for emotion in EMOTIONS:
        mean = np.mean([answer.probabilities[emotion] for answer in answers[:4]])
        assert answers[4].probabilities[emotion] == pytest.approx(mean)
    (alone,) = inference.predict(model, [(speech(7)[RATE * 7 // 4 : RATE * 7 // 2], RATE)])
    assert answers[1].probabilities == pytest.approx(alone.probabilities, abs=1e-3), "as if it were a recording"


def test_a_window_without_sound_is_left_out_of_the_whole(model):
    samples = speech(6)
    samples[2 * RATE : 4 * RATE] = 0
    *windows, whole = inference.predict(model, [(samples, RATE)])
    assert [bool(window.reason) for window in windows] == [False, True, False]
    assert whole.reason == ""
    assert whole.probabilities["sad"] == pytest.approx(
        (windows[0].probabilities["sad"] + windows[2].probabilities["sad"]) / 2
    )


def test_the_embedding_of_a_long_recording_is_the_mean_over_its_windows(model, tmp_path, monkeypatch):
    """Those that sound, embedded one by one, each as a recording."""
    samples = speech(7)
    samples[RATE * 7 // 4 : RATE * 7 // 2] = 0
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="FLOAT")
    parts = [samples[RATE * 7 // 4 * number :][: RATE * 7 // 4] for number in (0, 2, 3)]
    alone = [inference.embed(model, [(part, RATE)])[0] for part in parts]
    sources = [(speech(1, seed=1), RATE), tmp_path / "long.wav", (np.zeros(RATE), RATE), (samples, RATE)]
    short = inference.embed(model, sources[:1])[0]
    for size in (1, 3, 64):
        monkeypatch.setattr(inference, "GROUP", size)
        found = inference.embed(model, sources)
        assert found.dtype == np.float32
        assert np.isnan(found[2]).all()
        for row, expected in ((0, short), (1, np.mean(alone, axis=0)), (3, np.mean(alone, axis=0))):
            np.testing.assert_allclose(found[row], expected, atol=2e-3)
    assert inference.embed(model, []).shape == (0, len(short))


def test_groups_end_anywhere(model, monkeypatch):
    sources = [(speech(seconds, seed), RATE) for seed, seconds in enumerate((1, 7, 0.01, 5, 2))]
    together = list(inference.predict(model, sources))
    for size in (1, 2, 3):
        monkeypatch.setattr(inference, "GROUP", size)
        for one, other in zip(inference.predict(model, sources), together, strict=True):
            assert (one.start, one.end, one.reason) == (other.start, other.end, other.reason)
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)


def test_one_bad_recording_costs_no_other_its_answer(model, tmp_path, monkeypatch):
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, speech(5), RATE)
    load = pieces.load_windows

    def breaking(path, settings):
        windows = load(path, settings)
        yield next(windows)
        if path.name == "b.wav":
            raise OSError(5, "Input/output error", str(path))
        yield from windows

    monkeypatch.setattr(pieces, "load_windows", breaking)
    names = ["a.wav", "missing.wav", "b.wav", "x" * 300, "nul\0.wav", ".", "c.wav"]
    answers = list(inference.predict(model, [tmp_path / name for name in names]))
    wholes = [answer for answer in answers if answer.start is None]
    reasons = ["", "no such file", "cannot be read: Input/output error", "cannot be read: File name too long"]
    assert [answer.reason for answer in wholes] == [*reasons, "no such file", "a folder without recordings", ""]
    assert [bool(answer.probabilities) for answer in wholes] == [True, *[False] * 5, True]
    embedded = inference.embed(model, [tmp_path / name for name in names])
    assert np.isfinite(embedded).all(1).tolist() == [True, *[False] * 5, True]
    assert np.isnan(embedded).all(1).tolist() == [False, *[True] * 5, False]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_recording_that_is_decoded_twice_is_cut_like_one_in_memory(tmp_path, monkeypatch, rate):
    """The second way is for more than ten minutes, so the limit is lowered."""
    n = 70 * rate
    noise = np.random.default_rng(0).standard_normal((n, 2)) * np.abs(np.sin(np.arange(n) / rate))[:, None]
    noise[: 2 * rate] *= 1e-4
    noise[-rate:] *= 1e-4
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    expected = list(long.load_windows(tmp_path / "a.wav", Audio(max_seconds=10.0)))
    monkeypatch.setattr(audio, "MAX_MINUTES", 1)
    monkeypatch.setattr(long, "BLOCK", 100_000)
    found = list(long.load_windows(tmp_path / "a.wav", Audio(max_seconds=10.0)))
    for one, other in zip(found, expected, strict=True):
        assert (one.start, one.end, one.number, one.of) == (other.start, other.end, other.number, other.of)
        np.testing.assert_allclose(one.waveform, other.waveform, atol=1e-6)


def test_an_hour_takes_no_more_memory_than_a_minute(tmp_path):
    import tracemalloc

    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 8_000, 1) as file:
        for minute in range(60):
            file.write(speech(30, seed=minute))
    tracemalloc.start()
    count = sum(1 for _ in long.load_windows(tmp_path / "hour.wav", Audio()))
    assert count == 120
    assert tracemalloc.get_traced_memory()[1] < 80_000_000, "all of it is 230 MB"
    tracemalloc.stop()


def test_what_is_not_finite_is_no_probability():
    """Loud recordings may overflow where others do not, as in fp16."""
    model = build(experiment("embedded/tiny-whisper", adapter={"method": "frozen"})).eval()
    forward = model.forward
    model.forward = lambda *batch: forward(*batch) + torch.tensor([[0.0], [torch.nan]])
    tones = [np.sin(np.arange(length) / 10).astype(np.float32) for length in (16_000, 24_000)]
    answers = list(inference.predict(model, [(tone, 16_000) for tone in tones]))
    assert [bool(answer.probabilities) for answer in answers] == [True, False]
    assert [answer.reason for answer in answers] == ["", inference.NOT_FINITE]
    file = io.StringIO()
    predict._FORMATS["jsonl"](answers, model.experiment.emotions, file)
    for line in file.getvalue().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
