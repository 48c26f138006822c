"""Recordings of any kind come out as checked 16 kHz waveforms, or are refused with a reason."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ser_ray.config import Audio
from ser_ray.speech.audio import (
    MARGIN,
    Unusable,
    from_int16,
    hop_energies,
    load_recording,
    load_waveform,
    speech_bounds,
    to_int16,
)

AUDIO = Audio()


def sine(rate: int, seconds: float = 2.0, frequency: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write(path: Path, values: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> Path:
    soundfile.write(path, values, rate, subtype=subtype)
    return path


def loudest_frequency(waveform: np.ndarray) -> float:
    """Hz, by a padded and windowed Fourier transform (0.06 Hz resolution)."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), n=2**18))
    return float(spectrum.argmax() * 16_000 / 2**18)


@pytest.mark.parametrize("rate", [96_000, 48_000, 44_100, 24_414, 22_050, 16_000, 8_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sine_keeps_frequency_duration_and_level_whatever_its_rate(tmp_path, rate, channels):
    values = np.stack([sine(rate)] * channels, axis=1)
    waveform = load_waveform(write(tmp_path / "sine.wav", values, rate), AUDIO)
    assert waveform.dtype == np.float32
    assert waveform.shape == (len(waveform),)
    assert loudest_frequency(waveform) == pytest.approx(440, rel=1e-3)
    assert len(waveform) / 16_000 == pytest.approx(2.0, rel=1e-3)
    middle = waveform[8_000:24_000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)


def test_what_lies_above_8_khz_does_not_fold_back(tmp_path):
    values = sine(48_000, frequency=1_000) + sine(48_000, frequency=11_000, level=0.4)
    waveform = load_waveform(write(tmp_path / "a.wav", values, 48_000), AUDIO)
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    frequencies = np.fft.rfftfreq(len(waveform), 1 / 16_000)
    assert spectrum[np.abs(frequencies - 5_000) < 50].max() < 1e-3 * spectrum.max()


def test_channels_are_averaged(tmp_path):
    values = np.stack([sine(16_000), np.zeros(32_000)], axis=1)
    waveform = load_waveform(write(tmp_path / "a.wav", values), AUDIO)
    np.testing.assert_allclose(waveform, sine(16_000) / 2, atol=1e-4)


@pytest.mark.parametrize(("name", "subtype"), [("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("a.mp3", "MPEG_LAYER_III")])
def test_other_containers(tmp_path, name, subtype):
    waveform = load_waveform(write(tmp_path / name, sine(16_000), 16_000, subtype), AUDIO)
    assert loudest_frequency(waveform) == pytest.approx(440, rel=1e-3)


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 1 / 128), ("PCM_16", 1 / 32768), ("PCM_24", 1e-6), ("FLOAT", 1e-6), ("DOUBLE", 1e-6)],
)
def test_sample_formats(tmp_path, subtype, step):
    values = np.stack([sine(16_000)] * 2, axis=1)
    recording = load_recording(write(tmp_path / "a.wav", values, subtype=subtype), AUDIO)
    np.testing.assert_allclose(recording.windows[0], sine(16_000), atol=step)
    assert recording.flags == ()


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1e-4, 0.003, 0.01, 0.3]), st.integers(1, 6_000)), min_size=1, max_size=6),
    st.sampled_from([20.0, 40.0, 60.0]),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_trimming_is_that_of_librosa(parts, trim_db, seed):
    from librosa.effects import trim

    noise = np.random.default_rng(seed)
    waveform = np.concatenate([level * noise.standard_normal(n) for level, n in parts]).astype(np.float32)
    if not waveform.any():
        return
    _, (start, end) = trim(waveform, top_db=trim_db)
    found = speech_bounds(hop_energies(waveform), len(waveform), trim_db)
    assert found == (max(0, start - MARGIN), min(end + MARGIN, len(waveform)))


def test_silence_around_speech_is_cut_up_to_a_margin(tmp_path):
    noise = 1e-4 * np.random.default_rng(0).standard_normal(16_000)
    path = write(tmp_path / "a.wav", np.concatenate([noise, sine(16_000, 1.0), noise]))
    trimmed = load_waveform(path, AUDIO)
    # A frame of 2048 samples that touches the sine counts as sound: 64 ms, and 50 ms of margin, on each side.
    assert 1.0 + 2 * 0.05 <= len(trimmed) / 16_000 <= 1.0 + 2 * (0.05 + 0.1)
    assert np.abs(trimmed).max() == pytest.approx(0.5, abs=1e-3)
    assert len(load_waveform(path, Audio(trim_db=None))) == 48_000


def test_a_pause_inside_stays(tmp_path):
    path = write(tmp_path / "a.wav", np.concatenate([sine(16_000, 1.0), np.zeros(8_000), sine(16_000, 1.0)]))
    assert len(load_waveform(path, AUDIO)) == 40_000


def test_float_recordings_beyond_full_scale_are_scaled_not_clipped(tmp_path):
    waveform = load_waveform(write(tmp_path / "a.wav", sine(16_000, level=4.0), subtype="FLOAT"), AUDIO)
    np.testing.assert_allclose(waveform, sine(16_000, level=1.0), atol=1e-3)
    assert np.abs(waveform).max() <= 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(0), "empty"),
        (np.zeros(16_000), "silent"),
        (sine(16_000, level=0.0009), "silent"),
        (np.where(np.arange(16_000) == 5, np.nan, sine(16_000, 1.0)), "not finite"),
        (np.where(np.arange(16_000) == 5, np.inf, sine(16_000, 1.0)), "not finite"),
        (sine(16_000, 0.2), "too short: 0.20 s after trimming, less than 0.3 s"),
        (sine(16_000, 31.0), "too long: 31.0 s after trimming, more than 30 s"),
        (np.concatenate([np.zeros(16_000), sine(16_000, 0.02), np.zeros(16_000)]), "too short"),
    ],
)
def test_unusable_recordings_say_why(tmp_path, values, reason):
    path = write(tmp_path / "a.wav", values, subtype="FLOAT")
    with pytest.raises(Unusable, match=reason):
        load_waveform(path, AUDIO)


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF\x00\x00\x00\x00WAVE"])
def test_what_is_no_audio_is_refused(tmp_path, content):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(Unusable, match="cannot be decoded"):
        load_waveform(path, AUDIO)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Unusable, match="no such file"):
        load_waveform(tmp_path / "none.wav", AUDIO)


def test_a_truncated_file_is_read_as_far_as_it_goes_or_refused(tmp_path):
    path = write(tmp_path / "a.wav", sine(16_000))
    path.write_bytes(path.read_bytes()[:32_044])
    assert len(load_waveform(path, AUDIO)) == 16_000


def flac_claiming(path: Path, frames: int, rate: int = 16_000) -> Path:
    """A short FLAC file whose header claims ``frames`` (36 bits) at ``rate`` (20 bits)."""
    write(path, sine(16_000, 0.5), 16_000)
    content = bytearray(path.read_bytes())
    assert content[:4] == b"fLaC"
    # STREAMINFO begins at byte 8; rate, channels, bits per sample and frames are the 64 bits from its byte 10 on.
    (packed,) = struct.unpack(">Q", content[18:26])
    channels_and_bits = (packed >> 36) & 0xFF
    content[18:26] = struct.pack(">Q", rate << 44 | channels_and_bits << 36 | frames)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("frames", "rate", "claim"),
    [(2**31, 16_000, "minutes"), (2**36 - 1, 16_000, "minutes"), (300_000_000, 600_000, "frames"), (8_000, 100, "Hz")],
)
def test_absurd_claims_are_refused_before_memory_is_spent(tmp_path, frames, rate, claim):
    path = flac_claiming(tmp_path / "a.flac", frames, rate)
    tracemalloc.start()
    with pytest.raises(Unusable, match=f"claims.*{claim}"):
        load_waveform(path, AUDIO)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_recording_of_24_hours_is_refused_by_its_header(tmp_path):
    path = write(tmp_path / "a.wav", sine(16_000))
    size = 24 * 3600 * 16_000 * 2
    header = bytearray(path.read_bytes()[:44])
    header[4:8], header[40:44] = struct.pack("<I", size + 36), struct.pack("<I", size)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + size)  # sparse: takes no disk
    tracemalloc.start()
    with pytest.raises(Unusable, match="claims 1440 minutes of audio, more than 10"):
        load_waveform(path, AUDIO)
    with pytest.raises(Unusable, match="silent"):
        load_waveform(path, AUDIO, start=80_000, end=80_010)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("claimed", [2**32 - 1, 2**32 - 2, 2**31])
def test_a_wav_header_that_claims_4_gb_is_flagged_and_read_as_far_as_it_goes(tmp_path, claimed):
    path = write(tmp_path / "a.wav", sine(16_000))
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", claimed)
    path.write_bytes(content)
    recording = load_recording(path, AUDIO)
    assert len(recording.windows[0]) == 32_000
    assert recording.flags == (f"the header claims {claimed} bytes of audio, the file holds 64000",)


def test_a_wav_header_that_claims_less_than_there_is_is_flagged(tmp_path):
    path = write(tmp_path / "a.wav", sine(16_000))
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", 32_000)
    path.write_bytes(content)
    assert load_recording(path, AUDIO).flags == ("the header claims 32000 bytes of audio, the file holds more",)


def test_chunks_around_the_audio_are_no_lie(tmp_path):
    path = write(tmp_path / "a.wav", sine(16_000))
    content = path.read_bytes()
    note = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    path.write_bytes(content[:36] + note + content[36:] + note)
    recording = load_recording(path, AUDIO)
    assert recording.flags == ()
    assert len(recording.windows[0]) == 32_000


def test_half_an_mp3_is_flagged(tmp_path):
    path = write(tmp_path / "a.mp3", sine(16_000), 16_000, "MPEG_LAYER_III")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (flag,) = load_recording(path, AUDIO).flags
    assert flag.startswith("the header claims 2.0 s, the file holds 0.")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.other"])
def test_a_name_that_promises_another_container_is_flagged(tmp_path, suffix, name):
    with (tmp_path / name).open("wb") as file:
        soundfile.write(file, sine(16_000), 16_000, format=suffix.upper())
    flags = load_recording(tmp_path / name, AUDIO).flags
    expected = () if name in (f"a.{suffix}", "a.other") else (f"named .{name[2:]}, but holds {suffix.upper()}",)
    assert flags == expected


def test_raw_audio_is_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(32_000))
    with pytest.raises(Unusable, match="does not say what it holds"):
        load_waveform(tmp_path / "a.raw", AUDIO)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("channel", [0, 1])
def test_clipping_is_flagged_in_any_channel(tmp_path, subtype, channel):
    values = np.zeros((32_000, 2))
    values[:, channel] = np.clip(2 * sine(16_000, level=1.0), -1, 1)
    (flag,) = load_recording(write(tmp_path / "a.wav", values, subtype=subtype), AUDIO).flags
    assert flag.startswith("clipped: ")
    share = 100 * np.mean(np.abs(values[:, channel]) >= 0.99)
    assert float(flag.split("%")[0].removeprefix("clipped: ")) == pytest.approx(share, abs=1)  # 8 bit: coarse steps


def test_a_few_peaks_at_full_scale_are_not_flagged(tmp_path):
    values = sine(16_000)
    values[:31] = 1.0
    assert load_recording(write(tmp_path / "a.wav", values), AUDIO).flags == ()
    values[:32] = 1.0
    assert load_recording(write(tmp_path / "a.wav", values), AUDIO).flags != ()


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_part_is_that_of_the_whole(tmp_path, name):
    values = np.concatenate([sine(22_050, 1.0, 440), sine(22_050, 1.0, 880), sine(22_050, 1.0, 1760)])
    path = write(tmp_path / name, values, 22_050)
    for number, frequency in enumerate((440, 880, 1760)):
        waveform = load_waveform(path, AUDIO, start=float(number), end=number + 1.0)
        assert len(waveform) == 16_000
        assert loudest_frequency(waveform) == pytest.approx(frequency, rel=1e-3)
    assert len(load_waveform(path, AUDIO, end=1.5)) == 24_000
    assert len(load_waveform(path, AUDIO, start=1.5)) == 24_000
    beyond = load_recording(path, AUDIO, start=2.0, end=5.0)
    assert len(beyond.windows[0]) == 16_000
    assert beyond.flags == ("should end at 5 s, but the recording ends at 3.00 s",)


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (3.0, 4.0, r"begins at 3 s, but the recording ends at 2.00 s"),
        (float("inf"), None, "is invalid"),
        (float("nan"), 1.0, "is invalid"),
        (1.0, 1.0, "a part from 1 to 1 s is invalid"),
        (-1.0, 1.0, "is invalid"),
        (0.0, 0.1, "too short"),
    ],
)
def test_a_part_that_is_none_is_refused(tmp_path, start, end, reason):
    with pytest.raises(Unusable, match=reason):
        load_waveform(write(tmp_path / "a.wav", sine(16_000)), AUDIO, start, end)


@settings(deadline=None, max_examples=30)
@given(seconds=st.floats(0.3, 6), longest=st.floats(0.3, 3), shortest=st.floats(0.1, 0.3))
def test_windows_are_equal_within_bounds_and_miss_nothing(tmp_path_factory, seconds, longest, shortest):
    path = write(tmp_path_factory.mktemp("w") / "a.wav", sine(16_000, seconds))
    audio = Audio(min_seconds=shortest, max_seconds=longest, too_long="split", trim_db=None)
    try:
        windows = load_recording(path, audio).windows
    except Unusable as reason:
        assert "equal windows are too short" in str(reason)  # noqa: PT017
        assert longest < 2 * shortest
        return
    np.testing.assert_array_equal(np.concatenate(windows), load_waveform(path, Audio(trim_db=None)))
    lengths = [len(window) for window in windows]
    assert max(lengths) - min(lengths) <= 1
    assert shortest <= min(lengths) / 16_000
    assert max(lengths) / 16_000 <= longest


def test_one_waveform_is_never_split(tmp_path):
    path = write(tmp_path / "a.wav", sine(16_000, 4.0))
    with pytest.raises(Unusable, match=r"too long: 4.0 s"):
        load_waveform(path, Audio(max_seconds=3.0, too_long="split"))


def test_a_claim_of_many_channels_costs_no_memory(tmp_path):
    path = write(tmp_path / "a.wav", np.stack([sine(16_000)] * 200, axis=1))
    tracemalloc.start()
    assert len(load_waveform(path, AUDIO)) == 32_000
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


@pytest.mark.corpus
@pytest.mark.parametrize(("corpus", "pattern"), [("ravdess", "Actor_0[12]/*.flac"), ("emodb", "0*.flac")])
def test_real_speech_is_trimmed_as_by_librosa(shared_data, corpus, pattern):
    from librosa.effects import trim

    for path in sorted((shared_data / corpus).glob(pattern))[::7]:
        whole = load_waveform(path, Audio(trim_db=None))
        _, (start, end) = trim(whole, top_db=40)
        np.testing.assert_array_equal(load_waveform(path, AUDIO), whole[max(0, start - MARGIN) : end + MARGIN])


@given(arrays("<i2", st.integers(0, 200)))
def test_int16_survives_the_way_through_float(samples):
    np.testing.assert_array_equal(to_int16(from_int16(samples.tobytes())), samples)


@given(arrays(np.float32, st.integers(0, 200), elements=st.floats(-1, 1, width=32)))
def test_float_survives_the_way_through_int16_to_half_a_step(waveform):
    np.testing.assert_allclose(from_int16(to_int16(waveform).tobytes()), waveform, atol=1.0 / 32768)
    assert np.abs(from_int16(to_int16(waveform))).max(initial=0) <= 1


@pytest.mark.corpus
def test_real_speech_loses_its_silence_and_keeps_its_speech(shared_data):
    path = shared_data / "ravdess" / "Actor_12" / "03-01-05-02-01-01-12.flac"
    trimmed, whole = load_waveform(path, AUDIO), load_waveform(path, Audio(trim_db=None))
    assert 1.0 < len(trimmed) / 16_000 < len(whole) / 16_000 - 0.5
    assert np.sum(trimmed**2) == pytest.approx(np.sum(whole**2), rel=1e-3)
