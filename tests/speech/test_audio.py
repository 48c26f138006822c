"""Recordings of any kind come out as checked 16 kHz waveforms, or are refused with a reason."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ser_ray.config import Audio
from ser_ray.speech.audio import Unusable, from_int16, load_waveform, to_int16

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


@pytest.mark.parametrize("rate", [48_000, 44_100, 24_414, 22_050, 16_000, 8_000])
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
