"""The most confident mistakes, and the sound and picture that go with them."""

import base64
import io

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread
from report_fixtures import predictions, write_speech

from ser_ray.evaluation.mistakes import BANDS, log_mel, most_confident, recording, recordings
from ser_ray.evaluation.predictions import Predictions
from ser_ray.schema import UserError
from ser_ray.speech import shards


def _bytes(uri: str, kind: str) -> io.BytesIO:
    assert uri.startswith(f"data:{kind};base64,")
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))


def test_are_wrong_and_in_order_of_certainty():
    said = predictions(seed=3)
    wrong = said.predicted != said.labels
    found = most_confident(said, 5)
    assert [m.probability for m in found] == sorted(said.probabilities[wrong].max(axis=1), reverse=True)[:5]
    for mistake in found:
        i = said.utterance_ids.index(mistake.utterance_id)
        assert (mistake.true, mistake.predicted) == (said.emotions[said.labels[i]], said.emotions[said.predicted[i]])
        assert mistake.true_probability == said.probabilities[i, said.labels[i]] < mistake.probability
        assert mistake.speaker == said.speakers[i]
    assert len(most_confident(said, 10_000)) == wrong.sum()


def test_an_utterance_of_several_runs_is_named_once():
    rows = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    said = Predictions(("a", "b"), ("u", "v", "u", "u"), ("c",) * 4, ("s",) * 4, np.array([1, 1, 1, 1]), rows)
    assert [(m.utterance_id, m.probability) for m in most_confident(said)] == [("u", 0.9), ("v", 0.6)]


def test_a_recording_is_heard_as_it_was_prepared(tmp_path):
    ids = [f"ravdess/{i}" for i in range(8)]
    directory = write_speech(tmp_path / "speech", ids)
    found = recordings(["ravdess/3", "ravdess/6"], [directory])
    assert set(found) == {"ravdess/6", "ravdess/3"}
    kept = {
        row["utterance_id"]: np.frombuffer(row["audio"], dtype="<i2")
        for table in shards.read_tables([directory])
        for row in table.to_pylist()
    }
    for utterance_id, heard in found.items():
        samples, rate = soundfile.read(_bytes(heard.audio, "audio/flac"), dtype="int16")
        assert rate == 16_000
        assert np.array_equal(samples, kept[utterance_id])
        assert heard.seconds == len(samples) / 16_000


def test_what_is_not_there_is_said(tmp_path):
    directory = write_speech(tmp_path / "speech", ["ravdess/0", "ravdess/1"])
    with pytest.raises(UserError, match="ravdess/9: not in the prepared speech"):
        recordings(["ravdess/0", "ravdess/9"], [directory])
    with pytest.raises(UserError, match="not prepared"):
        recordings(["ravdess/0"], [tmp_path / "nowhere"])
    shards.shard_paths(directory)[1].unlink()
    with pytest.raises(UserError, match="no such shard"):
        recordings(["ravdess/0"], [directory])


def test_a_spectrogram_shows_pitch_upwards_and_time_to_the_right():
    time = np.arange(16_000) / 16_000
    tone = np.where(time < 0.5, np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 4000 * time))
    levels = log_mel(tone)
    assert levels.shape == (BANDS, 101)
    assert (levels.min(), levels.max()) == (0, 1)
    early, late = levels[:, 10:40].mean(axis=1).argmax(), levels[:, 60:90].mean(axis=1).argmax()
    assert early < 15 < 40 < late
    heard = recording((30_000 * tone).astype("<i2"))
    picture = imread(_bytes(heard.spectrogram, "image/png"))
    assert picture.shape == (BANDS, 101, 4)
    assert picture[..., :3].max() == 0  # black
    assert picture[:, 20, 3].argmax() > picture[:, 80, 3].argmax()  # rows count from the top


def test_silence_is_no_error():
    assert recording(np.zeros(1600, dtype="<i2")).seconds == 0.1
