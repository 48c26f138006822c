"""Formats beyond libsndfile's: read with PyAV, and never passed over without it; pipes, pointers, offsets."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser_ray.config import Audio
from ser_ray.speech import formats, long
from ser_ray.speech.audio import Unusable, is_silent, load_recording, load_waveform

AUDIO = Audio(trim_db=None)
RATE = 16_000
TONE = (0.3 * np.sin(2 * np.pi * 200 * np.arange(5 * RATE) / RATE)).astype(np.float32)
ENCODED = {
    "m4a": ("aac", RATE),
    "mp4": ("aac", 44_100),
    "webm": ("libopus", 48_000),
    "caf": ("alac", RATE),
    "amr": ("libopencore_amrnb", 8_000),
    "mka": ("flac", RATE),
    "3gp": ("aac", RATE),
    "aac": ("aac", RATE),
}


def encode(path: Path, codec: str, rate: int) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="adts" if path.suffix == ".aac" else None) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(TONE[None], format="flt", layout="mono")
        frame.rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
        resampler, fifo = av.AudioResampler(stream.format.name, "mono", rate), av.AudioFifo()
        for part in resampler.resample(frame) + resampler.resample(None):
            fifo.write(part)
        while (part := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def m4a(tmp_path_factory) -> Path:
    return encode(tmp_path_factory.mktemp("m4a") / "a.m4a", *ENCODED["m4a"])


def loudness(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(waveform**2)))


@pytest.mark.parametrize("suffix", ENCODED)
def test_a_recording_of_another_format_is_that_recording(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", *ENCODED[suffix])
    recording = load_recording(path, AUDIO)
    (waveform,) = recording.windows
    assert recording.flags == ()
    assert len(waveform) / RATE == pytest.approx(5, abs=0.15)  # encoders pad, and the shortest frame is lost
    middle = waveform[RATE : 4 * RATE]
    assert loudness(middle) == pytest.approx(loudness(TONE), rel=0.35)  # of AMR
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() / 3 == pytest.approx(200, abs=1)
    (window,) = long.load_windows(path, AUDIO)
    np.testing.assert_allclose(window.waveform, waveform, atol=1e-6)


def test_a_part_is_that_of_the_whole(m4a):
    (whole,) = load_recording(m4a, AUDIO).windows
    np.testing.assert_allclose(load_waveform(m4a, AUDIO, 3.0, 4.0), whole[3 * RATE : 4 * RATE], atol=1e-3)
    np.testing.assert_allclose(load_waveform(m4a, AUDIO, end=1.0), whole[:RATE], atol=1e-3)
    with pytest.raises(Unusable, match=r"begins at 60 s, but the recording ends before"):
        load_waveform(m4a, AUDIO, 60.0)
    (flag,) = load_recording(m4a, AUDIO, 4.0, 8.0).flags
    assert flag.startswith("should end at 8 s, but the recording ends at 5.")


def test_the_content_decides_and_not_the_name(m4a, tmp_path):
    (tmp_path / "concat:a|b.wav").write_bytes(m4a.read_bytes())
    recording = load_recording(tmp_path / "concat:a|b.wav", AUDIO)
    assert len(recording.windows[0]) > 4 * RATE
    assert recording.flags == ("named .wav, but holds MP4",)


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3", b"#!AMR\n", b"0&\xb2u\x8ef\xcf\x11", b"\xff\xf1"]
)
@pytest.mark.parametrize("is_there", [False, True])
def test_what_is_no_recording_is_refused_with_and_without_pyav(tmp_path, monkeypatch, head, is_there):
    if is_there:
        pytest.importorskip("av")
    monkeypatch.setattr(formats, "has_pyav", lambda: is_there)
    (tmp_path / "a.m4a").write_bytes(head + bytes(100))
    said = "cannot be decoded|holds pictures|empty" if is_there else r"is read by PyAV, which is missing: pip install"
    with pytest.raises(Unusable, match=said):
        load_waveform(tmp_path / "a.m4a", AUDIO)


def test_cut_and_changed_files_are_recordings_or_refused(m4a, tmp_path):
    content, rng = m4a.read_bytes(), np.random.default_rng(0)
    for number in range(100):
        changed = bytearray(content[: rng.integers(1, len(content))] if number % 2 else content)
        for place in rng.integers(0, len(changed), 20):
            changed[place] = rng.integers(256)
        (tmp_path / "a.m4a").write_bytes(changed)
        try:
            assert np.isfinite(load_waveform(tmp_path / "a.m4a", AUDIO)).all()
        except Unusable:
            continue


def wav(length: int | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, RATE, format="WAV", subtype="PCM_16")
    content = bytearray(file.getvalue())
    if length is not None:
        content[4:8] = content[40:44] = struct.pack("<I", length)
    return bytes(content)


def test_a_title_that_is_not_utf_8_is_no_fault_of_the_recording(m4a, tmp_path):
    content = m4a.read_bytes()
    assert content.count(b"Lavf") == 1, "the name of the encoder"
    (tmp_path / "a.m4a").write_bytes(content.replace(b"Lavf", b"\xff\xfevf"))
    assert np.array_equal(load_waveform(tmp_path / "a.m4a", AUDIO), load_waveform(m4a, AUDIO))


@pytest.mark.parametrize("length", [0, 2**32 - 1, 2**31 - 1])
def test_a_wav_file_without_a_length_is_read_to_its_end(tmp_path, length):
    (tmp_path / "a.wav").write_bytes(wav(length))
    (waveform,) = load_recording(tmp_path / "a.wav", AUDIO).windows
    np.testing.assert_allclose(waveform, TONE, atol=1e-4)
    np.testing.assert_allclose(load_waveform(tmp_path / "a.wav", AUDIO, 2.0, 3.0), TONE[2 * RATE : 3 * RATE], atol=1e-4)


def test_a_wav_file_of_no_audio_is_empty(tmp_path):
    head = wav()[:40]
    for rest in (struct.pack("<I", 0), struct.pack("<I", 0) + b"LIST" + struct.pack("<I", 4) + b"abcd"):
        (tmp_path / "a.wav").write_bytes(head + rest)
        with pytest.raises(Unusable, match="empty"):
            load_waveform(tmp_path / "a.wav", AUDIO)


def test_a_pipe_and_standard_input_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(wav(0),)).start()
    (window,) = long.load_windows(tmp_path / "pipe", AUDIO)
    np.testing.assert_allclose(window.waveform, TONE, atol=1e-4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(wav())))
    (window,) = long.load_windows(long.STDIN, AUDIO)
    np.testing.assert_allclose(window.waveform, TONE, atol=1e-4)
    with pytest.raises(Unusable, match="not a file"):
        next(long.load_windows(Path("/dev/null"), AUDIO))


def test_a_git_lfs_pointer_says_so(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / "a.wav").write_text(text)
    with pytest.raises(Unusable, match="a Git LFS pointer, not the recording; run git lfs pull"):
        load_waveform(tmp_path / "a.wav", AUDIO)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("offset", [0.1, -0.7, 3.0])
def test_a_constant_is_silence_whatever_its_level(tmp_path, rate, offset):
    noise = 2e-4 * np.random.default_rng(0).standard_normal(2 * rate)
    soundfile.write(tmp_path / "a.wav", offset + noise, rate, subtype="FLOAT")
    with pytest.raises(Unusable, match="silent"):
        load_waveform(tmp_path / "a.wav", AUDIO)
    assert is_silent(offset + noise)
    tone = 0.01 * np.sin(np.arange(2 * rate))
    soundfile.write(tmp_path / "b.wav", 0.1 + tone, rate, subtype="FLOAT")
    assert len(load_waveform(tmp_path / "b.wav", AUDIO)) == 2 * RATE
