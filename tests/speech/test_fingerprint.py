"""Versions of one take are found, other takes are not; fingerprints are made once and follow the shards."""

from __future__ import annotations

import hashlib
import io
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.config import Audio
from ser_ray.speech import fingerprint as fp
from ser_ray.speech import matching, shards
from ser_ray.speech.audio import load_waveform, to_int16

RATE = 16_000


def voice(seed: int, seconds: float = 2.0) -> np.ndarray:
    """Something like speech: a gliding pitch under formants that move from sound to sound, with pauses and noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    knots = np.arange(0, seconds + 0.1, 0.1)

    def glide(low: float, high: float) -> np.ndarray:
        return np.interp(time, knots, rng.uniform(low, high, len(knots)))

    phase = 2 * np.pi * np.cumsum(glide(90, 260)) / RATE
    formants = [(glide(300, 900), 1.0), (glide(900, 2300), 0.7), (glide(2300, 3300), 0.4)]
    frequency = np.gradient(phase, 1 / RATE) / (2 * np.pi)
    speech = np.zeros(len(time))
    for harmonic in range(1, 36):
        weight = sum(gain * np.exp(-(((harmonic * frequency - centre) / 150) ** 2)) for centre, gain in formants)
        speech += weight * np.sin(harmonic * phase)
    loudness = np.clip(glide(-0.3, 1.0), 0, None)
    return (0.1 * speech * loudness + 0.0005 * rng.standard_normal(len(time))).astype(np.float32)


def coded(waveform: np.ndarray, container: str, subtype: str) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format=container, subtype=subtype)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def down_and_up(waveform: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(soxr.resample(waveform, RATE, rate), rate, RATE)


def noisy(waveform: np.ndarray, snr_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(waveform))
    return waveform + noise * np.sqrt(np.mean(waveform**2)) * 10 ** (-snr_db / 20)


VERSIONS = {
    "8 kHz and back": lambda x: down_and_up(x, 8000),
    "11.025 kHz and back": lambda x: down_and_up(x, 11_025),
    "trimmed by 300 ms at each end": lambda x: x[4800:-4800],
    "trimmed by half a frame": lambda x: x[128:],
    "silence before": lambda x: np.pad(x, (RATE, 0)),
    "12 dB louder": lambda x: x * 4,
    "12 dB softer": lambda x: x / 4,
    "upside down": lambda x: -x,
    "MP3": lambda x: coded(x, "MP3", "MPEG_LAYER_III"),
    "Vorbis": lambda x: coded(x, "OGG", "VORBIS"),
    "noise at 20 dB": lambda x: noisy(x, 20),
    "all at once": lambda x: noisy(coded(down_and_up(x[3000:-2000] / 2, 8000), "MP3", "MPEG_LAYER_III"), 20),
}


def found(waveforms: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    return [
        (take.one, take.other)
        for take in matching.same_recordings({i: fp.fingerprint(w) for i, w in waveforms.items()})
    ]


@pytest.fixture(scope="module")
def voices() -> dict[str, np.ndarray]:
    return {f"v{seed}": voice(seed) for seed in range(12)}


def test_different_takes_are_not_found(voices):
    assert found(voices) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_of_a_take_is_found_and_nothing_else(voices, version):
    copies = {f"{i} again": VERSIONS[version](w) for i, w in list(voices.items())[:4]}
    assert found(voices | copies) == [(i, f"{i} again") for i in list(voices)[:4]]


def test_the_overlap_and_the_offset_are_those_of_the_cut():
    whole = voice(3, seconds=3.0)
    one, other = fp.fingerprint(whole), fp.fingerprint(whole[20 * fp.HOP :])
    assert fp.difference(one, other, 20) == 0
    assert fp.difference(other, one, -20) == 0
    assert 0.3 < fp.difference(one, other, 60) < 0.7
    assert fp.difference(one, other, len(one) - 5) == 1, "too little in common to tell"


def test_speech_that_two_cuts_share_is_found_if_it_is_half_of_the_shorter():
    whole = voice(4, seconds=4.0)
    assert found({"a": whole[: 2 * RATE], "b": whole[RATE // 2 : 5 * RATE // 2]}) == [("a", "b")]
    assert found({"a": whole[: 2 * RATE], "b": whole[3 * RATE // 2 : 7 * RATE // 2]}) == []


def test_tones_and_silence_are_no_evidence():
    time = np.arange(2 * RATE) / RATE
    beat = np.sin(2 * np.pi * 440 * time) * (1 + np.sin(2 * np.pi * 4 * time))
    noise = 1e-3 * np.random.default_rng(0).standard_normal((2, len(time)))
    assert found({"a": beat + noise[0], "b": beat + noise[1]}) == []
    assert found({"a": np.zeros(RATE), "b": np.zeros(RATE), "c": np.zeros(2 * RATE)}) == []


def test_many_equal_utterances_are_linked_without_comparing_all_pairs():
    pairs = found({f"{n:03d}": voice(5) for n in range(60)})
    assert len(pairs) <= 60 * matching.NEIGHBOURS
    linked = {"000"}
    for one, other in pairs:
        assert one < other
        linked |= {other} if one in linked else set()
    assert len(linked) == 60


def test_nothing_and_one_utterance_have_no_pairs():
    assert found({}) == []
    assert found({"a": voice(1)}) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6000), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4]))
def test_a_fingerprint_has_a_row_every_16_ms_of_whatever_length_and_level(length, seed, scale):
    waveform = scale * np.random.default_rng(seed).standard_normal(length)
    rows = fp.fingerprint(waveform)
    assert rows.dtype == np.uint32
    assert len(rows) == max(0, length - fp.WINDOW - fp.LAG * fp.HOP) // fp.HOP + 1
    assert matching.same_recordings({"a": rows}) == []


def test_bits_say_what_the_bands_do():
    """A plain loop over the cells of a short noise, bit by bit."""
    waveform = np.random.default_rng(2).standard_normal(6000).astype(np.float32)
    rows, filters = fp.fingerprint(waveform), fp._filters()
    power = np.array(
        [
            np.abs(np.fft.rfft(waveform[start : start + fp.WINDOW] * np.hanning(fp.WINDOW))) ** 2 @ filters
            for start in range(0, len(waveform) - fp.WINDOW + 1, fp.HOP)
        ]
    )
    level = 10 * np.log10(power + power.max() / 1000)
    for frame, (bits, sure, _) in enumerate(rows.tolist()):
        for band in range(32):
            later = level[frame + fp.LAG, band + 1] - level[frame + fp.LAG, band]
            change = later - (level[frame, band + 1] - level[frame, band])
            if min(abs(change), abs(abs(change) - fp.SURE_DB)) > 1e-3:
                assert bits >> band & 1 == (change > 0)
                assert sure >> band & 1 == (abs(change) > fp.SURE_DB)


def write(directory, waveforms: dict[str, np.ndarray]) -> None:
    rows = []
    for i, waveform in waveforms.items():
        audio = to_int16(waveform).tobytes()
        words = {"utterance_id": i, "corpus": "c", "speaker": "c/1", "emotion": "sad", "path": f"{i}.wav"}
        size = {"duration": len(waveform) / RATE, "num_samples": len(waveform)}
        rows.append(words | size | {"audio": audio, "audio_sha256": hashlib.sha256(audio).hexdigest()})
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        shards.write_shard(pa.Table.from_pylist(part, schema=shards.SCHEMA), directory / f"{name}.parquet")
    shards.write_manifest(directory, "c", ["a.parquet", "b.parquet"], [], Audio())


def test_fingerprints_of_shards_are_made_once_and_follow_their_content(tmp_path, voices, monkeypatch):
    waveforms = {i: voices[i] for i in ("v0", "v1", "v2")}
    write(tmp_path, waveforms)
    made = fp.read_fingerprints(tmp_path)
    assert made.keys() == waveforms.keys()
    for i, rows in made.items():
        np.testing.assert_array_equal(rows, fp.fingerprint(to_int16(waveforms[i]).astype(np.float32) / 32768))
    with monkeypatch.context() as patch:
        patch.setattr(fp, "fingerprint", lambda waveform: pytest.fail("made again"))
        kept = fp.read_fingerprints(tmp_path)
    assert all((kept[i] == made[i]).all() for i in made)
    write(tmp_path, waveforms | {"v2": voices["v9"]})
    assert not np.array_equal(fp.read_fingerprints(tmp_path)["v2"], made["v2"])


def test_takes_are_found_across_directories(tmp_path, voices):
    write(tmp_path / "one", {i: voices[i] for i in ("v0", "v1", "v2")})
    write(tmp_path / "two", {"w0": voices["v7"], "w1": voices["v8"], "w2": VERSIONS["Vorbis"](voices["v1"])})
    (take,) = matching.same_recordings_in([tmp_path / "one", tmp_path / "two"])
    assert (take.one, take.other) == ("v1", "w2")
    assert 0 <= take.difference <= matching.THRESHOLD


def in_memory(prints: dict[str, np.ndarray]) -> list[tuple[str, str, float]]:
    """The same pairs by a plain loop over landmarks that holds everything in memory."""
    ids = sorted(prints)
    owners: dict[int, dict[int, int]] = {}
    for position, i in enumerate(ids):
        for frame, word in enumerate(prints[i][:, 2].tolist()):
            if word != fp.NONE:
                owners.setdefault(word, {}).setdefault(position, frame)
    votes: Counter[tuple[int, int, int]] = Counter()
    for frame_of in owners.values():
        positions = list(frame_of)
        for number, one in enumerate(positions):
            for other in positions[number + 1 : number + 1 + matching.NEIGHBOURS]:
                votes[one, other, frame_of[one] - frame_of[other]] += 1
    least: dict[tuple[str, str], float] = {}
    for (one, other, offset), count in votes.items():
        if count >= matching.VOTES:
            a, b = prints[ids[one]], prints[ids[other]]
            share = min(fp.difference(a, b, offset + d) for d in (-1, 0, 1))
            if share <= matching.THRESHOLD:
                least[ids[one], ids[other]] = min(share, least.get((ids[one], ids[other]), 1.0))
    return [(*pair, share) for pair, share in sorted(least.items())]


@pytest.mark.parametrize(("bucket", "part", "block"), [(2**24, 20_000, 2**20), (500, 7, 300)])
def test_what_is_sorted_in_files_finds_what_a_plain_loop_finds(voices, monkeypatch, bucket, part, block):
    for name, value in (("BUCKET", bucket), ("PART", part), ("BLOCK", block)):
        monkeypatch.setattr(matching, name, value)
    copies = {f"{n} of {i}": VERSIONS[v](voices[i]) for n, v in enumerate(VERSIONS) for i in ("v0", "v5")}
    prints = {i: fp.fingerprint(w) for i, w in (copies | voices).items()}
    found = [(pair.one, pair.other, pair.difference) for pair in matching.same_recordings(prints)]
    assert found == in_memory(prints)
    assert len(found) > 30


def test_the_same_corpora_are_compared_once(tmp_path, voices, monkeypatch):
    write(tmp_path / "one", {i: voices[i] for i in ("v0", "v1", "v2")})
    write(tmp_path / "two", {"w0": voices["v7"], "w1": voices["v8"], "w2": VERSIONS["Vorbis"](voices["v1"])})
    found = matching.same_recordings_in([tmp_path / "one", tmp_path / "two"])
    with monkeypatch.context() as patch:
        patch.setattr(matching, "_same", lambda *given: pytest.fail("compared again"))
        assert matching.same_recordings_in([tmp_path / "one", tmp_path / "two"]) == found
    assert matching.same_recordings_in([tmp_path / "one"]) == []
    write(tmp_path / "two", {"w0": voices["v0"], "w1": voices["v8"], "w2": voices["v9"]})
    assert [pair.other for pair in matching.same_recordings_in([tmp_path / "one", tmp_path / "two"])] == ["w0"]
    assert not list(tmp_path.rglob(".matching-*"))


@pytest.mark.corpus
def test_the_one_double_of_ravdess_is_found_and_no_other(shared_data):
    """Three actors, of whom one has the double; two statements, of which each has thirty takes an actor."""
    waveforms = {}
    for actor in ("02", "07", "18"):
        for path in sorted((shared_data / "ravdess" / f"Actor_{actor}").glob("*.flac")):
            waveforms[path.stem] = load_waveform(path, Audio())
    assert found(waveforms) == [("03-01-03-01-02-01-07", "03-01-03-01-02-02-07")]
