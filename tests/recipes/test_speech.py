"""The training speech: bytes that depend on seed and part alone, targets that fit the sound, nothing of the demo's."""

# ruff: noqa: RUF001 (letters of IPA look like others)

import math
import shutil

import numpy as np
import pytest

from recipes.embedded import speech
from ser_ray.corpora import synthetic
from ser_ray.models.pretraining import words
from ser_ray.schema import UserError

PER_PART = 5


def make(directory, parts=2, **settings):
    hours = parts * PER_PART * speech.MEAN_SECONDS / 3600
    speech.make(directory, hours, **{"per_part": PER_PART, **settings})


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two parts of five utterances."""
    directory = tmp_path_factory.mktemp("speech")
    make(directory)
    return directory


@pytest.fixture(scope="module")
def utterances(made):
    spoken = speech.Speech(made)
    return [spoken[number] for number in range(len(spoken))]


def test_targets_fit_the_waveform(utterances):
    assert len(utterances) == 2 * PER_PART
    for one in utterances:
        seconds = len(one.waveform_T) / 16_000
        assert one.waveform_T.dtype == np.float32
        assert 1 <= seconds <= 8
        assert 0.01 < np.abs(one.waveform_T).max() < 0.9
        assert len(one.f0_F) == len(one.waveform_T) // 320
        assert one.f0_F.dtype == np.float32
        assert one.phones.dtype == one.phone_frames.dtype == np.int64
        assert one.phones[0] == one.phone_frames[0] == 0
        assert (np.diff(one.phone_frames) >= 0).all()
        assert one.phone_frames[-1] < len(one.f0_F)
        assert 3 < len(one.phones) / seconds < 25
        assert tuple(one.numbers) == speech.NUMBERS


def test_silence_around_is_short(utterances):
    for one in utterances:
        loud = np.flatnonzero(np.abs(one.waveform_T) > 0.002)
        assert 0.04 < loud[0] / 16_000 < 0.35
        if len(one.waveform_T) < 8 * 16_000:
            assert 0.04 < (len(one.waveform_T) - loud[-1]) / 16_000 < 0.35


def test_f0_lies_in_the_range_of_the_voice(utterances):
    """espeak-ng leaves the range a little, and reads 5 % below the base when monotone."""
    for number, one in enumerate(utterances):
        voice = speech._draw(0, number).voice
        voiced = one.f0_F[one.f0_F > 0]
        assert 0.3 < len(voiced) / len(one.f0_F) < 0.98
        assert voice.low * 0.87 < np.median(voiced) < voice.high * 1.1
        assert np.mean((voiced > voice.low * 0.85) & (voiced < voice.high * 1.25)) > 0.85


@pytest.mark.parametrize("pitch", [70, 123, 250, 480])
def test_f0_of_pulses_is_exact(pitch):
    time = np.arange(16_000) / 8000
    tone = sum(np.cos(2 * np.pi * pitch * k * time + k) for k in range(1, 3500 // pitch)) * (time < 1)
    tone = tone + 0.001 * np.random.default_rng(0).standard_normal(len(time))
    found = speech._f0(tone, 100, pitch / 1.8, pitch * 2.2)
    assert found.shape == (100,)
    np.testing.assert_allclose(found[2:47], pitch, rtol=0.01)
    assert (found[55:] == 0).all()


def test_unvoiced_frames_are_where_phones_are_pauses(utterances):
    silent = voiced = 0
    for one in utterances:
        ends = np.append(one.phone_frames[1:], len(one.f0_F))
        for phone, start, end in zip(one.phones, one.phone_frames, ends, strict=True):
            if speech.PHONES[phone] == "pause":
                silent += end - start
                voiced += np.count_nonzero(one.f0_F[start + 1 : end - 1])
    assert voiced < 0.1 * silent


def test_progress_and_sizes(tmp_path):
    progress = []
    make(tmp_path, on_progress=lambda *told: progress.append(told))
    assert progress == [(1, 2), (2, 2)]
    assert sorted(content(tmp_path)) == ["part-0000.safetensors", "part-0001.safetensors", speech.SETTINGS]


def test_a_lost_part_is_made_again_the_same_and_the_other_kept(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    kept, lost = copy / "part-0000.safetensors", copy / "part-0001.safetensors"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    with pytest.raises(UserError, match=r"part-0001\.safetensors is missing"):
        speech.Speech(copy)
    make(copy)
    assert kept.stat().st_mtime_ns == before
    assert content(copy) == content(made)


def test_more_hours_are_added(made, tmp_path):
    make(tmp_path, parts=1)
    assert len(speech.Speech(tmp_path)) == PER_PART
    make(tmp_path, parts=2)
    assert content(tmp_path) == content(made)
    make(tmp_path, parts=1)
    assert len(speech.Speech(tmp_path)) == 2 * PER_PART
    assert len(speech.Speech(tmp_path, parts=1)) == PER_PART, "what was asked for, where there is more"


def test_processes_make_the_same(made, tmp_path):
    make(tmp_path, workers=2)
    assert content(tmp_path) == content(made)


@pytest.mark.parametrize("other", [{"seed": 1}, {"per_part": 4}])
def test_other_settings_are_refused(made, other):
    before = content(made)
    with pytest.raises(UserError, match="holds speech of other settings"):
        make(made, **other)
    assert content(made) == before


def test_other_seeds_say_other_things():
    assert not set(speech.sentences(0, 50)) & set(speech.sentences(1, 50))


def test_no_speech_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no speech was made there"):
        speech.Speech(tmp_path)


def test_only_what_is_there_can_be_taken(made):
    with pytest.raises(IndexError):
        speech.Speech(made)[2 * PER_PART]
    with pytest.raises(IndexError):
        speech.Speech(made)[-1]


@pytest.mark.parametrize("seed", [0, 1, 12_345])
def test_sentences_of_the_demo_never_occur(seed):
    assert speech.shared_with_demo(speech.sentences(seed, 1500)) == []


def test_sentences_of_the_demo_cannot_occur():
    known = {word for lexicon in speech.lexicon_words().values() for word in lexicon}
    for sentence in synthetic.SENTENCES:
        assert len(set(words(sentence)) - known) >= 2


def test_a_sentence_of_the_demo_is_found():
    said = speech.sentences(0, 20)
    said[3] = "so, SHE put  the keys; next to the door - yes!"
    said[7] = "The letter is lying on the tables."
    assert speech.shared_with_demo(said) == ["She put the keys next to the door."]


def test_sentences_are_the_plans(made, utterances):
    plans = [speech._draw(0, number) for number in range(len(utterances))]
    assert speech.sentences(0, len(utterances)) == [plan.text for plan in plans]
    for plan, one in zip(plans, utterances, strict=True):
        assert list(one.numbers.values()) == pytest.approx(plan.numbers)


def test_sentences_have_3_to_12_words():
    counts = [len(text.split()) for text in speech.sentences(0, 500)]
    assert min(counts) == 3
    assert max(counts) == 12
    assert {text[-1] for text in speech.sentences(0, 500)} == set(".?!")


def test_voices_are_wide_apart_and_half_are_english():
    numbers = np.array([speech._draw(0, number).numbers for number in range(1500)])
    pitch, spread, rate, tract, language, speaker = numbers.T
    assert 2 ** pitch.min() < 75
    assert 2 ** pitch.max() > 380
    assert spread.min() < 1
    assert spread.max() > 16
    assert 2 ** rate.min() == pytest.approx(90, abs=3)
    assert 2 ** rate.max() == pytest.approx(320, abs=3)
    assert tract.min() < 85 < 125 < tract.max()
    assert 0.45 < np.mean(language == 0) < 0.55
    assert len(set(language)) == len(speech.LANGUAGES)
    assert len(set(speaker)) > 0.85 * speech.SPEAKERS
    within = [pitch[speaker == number].std() for number in set(speaker) if np.sum(speaker == number) > 2]
    assert np.mean(within) > 3 / 12


def test_voices_can_be_spoken():
    for number in range(1500):
        voice = speech._draw(1, number).voice
        assert 30 < voice.low < voice.high < 900
        assert 90 <= round(voice.words_per_minute) <= 320
        assert all(60 < formant < 160 for formant in voice.formants)


def test_speakers_are_not_those_of_the_demo():
    for number in range(50):
        demo, own = synthetic.draw_speaker(0, number), speech.draw_speaker(0, number)
        assert not set(demo.formants) & set(own.formants)
        assert not math.isclose(demo.pitch, own.pitch)


def test_phones_are_classes_of_their_own():
    assert len(set(speech.PHONES)) == len(speech.PHONES) <= 80
    names = ["ˈaɪ", "ɔ̃", "uː", "tʃ", "yø", "t̪", "ç", "õ", "ɑ̃", "pf", "aɪɚ", "", "§", "r̝"]
    expected = ["aɪ", "ɔ", "u", "tʃ", "y", "t", "ç", "o", "ɑ", "p", "aɪ", "pause", "other", "r"]
    assert [speech.PHONES[speech._class(name)] for name in names] == expected


def test_pauses_are_merged_and_short_ones_left_out():
    phones = ((0.1, "b"), (0.2, ""), (0.21, ""), (0.4, "(en)"), (0.4, "a"), (0.5, ""), (0.501, "b"), (9.0, "c"))
    places, frames = speech._classes(phones, 0.1, frames=100)
    assert [speech.PHONES[place] for place in places] == ["pause", "b", "pause", "a", "b"]
    assert frames.tolist() == [0, 10, 15, 25, 30]
