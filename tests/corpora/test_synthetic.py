"""The embedded corpus: counts, the same bytes for the same seed, whatever was spoken before, and no half of it."""

import json
from collections import Counter
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray import corpora
from ser_ray.corpora import espeak, synthetic
from ser_ray.schema import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three speakers, two repetitions, and the progress that was told."""
    directory, progress = tmp_path_factory.mktemp("made"), []
    synthetic.make(directory, speakers=3, repetitions=2, on_progress=lambda *told: progress.append(told))
    return directory, progress


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_counts(made):
    directory, progress = made
    utterances, rejected = corpora.read("synthetic", directory)
    assert rejected == []
    assert len(utterances) == 3 * 7 * 2
    assert Counter(u.emotion for u in utterances) == dict.fromkeys(synthetic.RULES, 6)
    assert Counter(u.speaker for u in utterances) == {f"synthetic/s{n:02}": 14 for n in range(3)}
    assert {(u.speaker[-3:], u.gender) for u in utterances} == {("s00", "female"), ("s01", "male"), ("s02", "female")}
    assert progress == [(done, 42) for done in range(1, 43)]


def test_words_tell_nothing_of_emotion(made):
    utterances, _ = corpora.read("synthetic", made[0])
    texts = Counter((u.speaker, u.text_id, u.emotion) for u in utterances)
    assert set(texts.values()) == {1}
    assert len({(u.speaker, u.text_id) for u in utterances}) * 7 == len(utterances)


def test_recordings_are_speech(made):
    """16 bit, mono, seconds long, neither clipped nor silent; women's voices above men's."""
    utterances, _ = corpora.read("synthetic", made[0])
    pitch = {}
    for utterance in utterances:
        info = soundfile.info(made[0] / utterance.path)
        assert (info.samplerate, info.channels, info.subtype) == (espeak.RATE, 1, "PCM_16")
        assert 0.8 < info.duration < 4
        waveform, _ = soundfile.read(made[0] / utterance.path)
        assert 0.01 < np.abs(waveform).max() < 1
        if utterance.emotion == "neutral":
            voiced = librosa.yin(waveform, fmin=60, fmax=500, sr=espeak.RATE)
            pitch.setdefault(utterance.speaker, []).append(np.median(voiced))
    medians = [np.mean(pitch[f"synthetic/s{n:02}"]) for n in range(3)]
    assert medians[1] < 160 < min(medians[0], medians[2])


def test_the_manifest_tells_what_was_spoken(made):
    manifest = json.loads((made[0] / synthetic.MANIFEST).read_text())
    assert {u["file"] for u in manifest["utterances"]} | {synthetic.MANIFEST} == set(content(made[0]))
    sad, fear = (
        np.mean([u["pitch"] for u in manifest["utterances"] if f"_{emotion}_" in u["file"]])
        for emotion in ("sad", "fear")
    )
    assert sad < fear


def test_same_seed_same_bytes(made, tmp_path):
    synthetic.make(tmp_path / "again", speakers=3, repetitions=2)
    assert content(tmp_path / "again") == content(made[0])


def test_other_seed_other_bytes(made, tmp_path):
    synthetic.make(tmp_path / "other", seed=1, speakers=1, repetitions=1)
    for name, other in content(tmp_path / "other").items():
        assert other != (made[0] / name).read_bytes()


def test_a_smaller_corpus_is_a_part_of_a_larger_one(made, tmp_path):
    synthetic.make(tmp_path / "less", speakers=2, repetitions=1)
    less = content(tmp_path / "less")
    less.pop(synthetic.MANIFEST)
    assert len(less) == 14
    assert less.items() <= content(made[0]).items()


def test_what_was_said_before_is_not_heard():
    """All accents, backwards and forwards: espeak-ng keeps state over restarts, of which nothing may remain."""
    speakers = [synthetic.draw_speaker(0, number) for number in range(12)]
    plan = [(n, emotion) for n in range(12) for emotion in ("angry", "fear", "sad")]

    def say(speak, number, emotion):
        voice = synthetic._voice(speakers[number], synthetic.RULES[emotion])
        return speak(synthetic.SENTENCES[number], voice, 1).tobytes()

    with espeak.synthesiser() as speak:
        forwards = {key: say(speak, *key) for key in plan}
    with espeak.synthesiser() as speak:
        backwards = {key: say(speak, *key) for key in reversed(plan)}
    assert forwards == backwards
    assert len(set(forwards.values())) == len(plan)


def test_a_finished_directory_is_left_alone(tmp_path):
    directory = tmp_path / "corpus"
    synthetic.make(directory, speakers=1, repetitions=1)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    synthetic.make(directory, speakers=1, repetitions=1, on_progress=lambda *told: pytest.fail("spoken again"))
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize("lost", ["recording", "manifest"])
def test_half_a_directory_is_made_whole(tmp_path, lost):
    directory = tmp_path / "corpus"
    synthetic.make(directory, speakers=1, repetitions=1)
    whole = content(directory)
    (directory / (synthetic.MANIFEST if lost == "manifest" else min(whole))).unlink()
    synthetic.make(directory, speakers=1, repetitions=1)
    assert content(directory) == whole


def test_other_settings_replace(tmp_path):
    directory = tmp_path / "corpus"
    synthetic.make(directory, speakers=2, repetitions=1)
    synthetic.make(directory, speakers=1, repetitions=1)
    assert len(corpora.read("synthetic", directory)[0]) == 7
    assert json.loads((directory / synthetic.MANIFEST).read_text())["settings"]["speakers"] == 1


def test_cut_off_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.make(tmp_path / "corpus", speakers=1, repetitions=1, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_not_deleted(tmp_path):
    (tmp_path / "mine.wav").touch()
    with pytest.raises(UserError, match=r"holds mine\.wav; give an empty directory"):
        synthetic.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.wav"]
    with pytest.raises(UserError, match="is a file"):
        synthetic.make(tmp_path / "mine.wav")


def test_nothing_to_say(tmp_path):
    with pytest.raises(UserError, match="give at least 1 of each"):
        synthetic.make(tmp_path / "corpus", speakers=0)


def test_espeak_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 50)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UserError, match="set TMPDIR to a shorter path"):
        synthetic.make(tmp_path / "corpus", speakers=1, repetitions=1)
    assert not (tmp_path / "corpus").exists()


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 200), st.sampled_from(sorted(synthetic.RULES)))
def test_drawn_prosody_can_be_spoken(seed, number, emotion):
    speaker = synthetic.draw_speaker(seed, number)
    prosody = synthetic._draw_prosody(speaker.style[emotion], np.random.default_rng(seed))
    voice = synthetic._voice(speaker, prosody)
    assert 40 < voice.low < voice.high < 900
    assert 80 < voice.words_per_minute < 450
    assert all(70 < formant < 145 for formant in voice.formants)
    assert 0 <= prosody.tremor < 1
    assert prosody.breath >= 0


@pytest.mark.parametrize(
    "name", ["s07-x_sad_t03_r2", "s7-m_sad_t03_r2", "s07-m_calm_t03_r2", "s07-m_sad_t3_r2", "s07-m_sad_t03", "hello"]
)
def test_other_names_are_rejected(name):
    with pytest.raises(ValueError, match="the name is not speaker-gender_emotion_sentence_repetition"):
        synthetic.parse(Path(f"{name}.wav"))
