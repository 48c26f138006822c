"""One recording -> one checked waveform: decode, downmix, resample, trim.

Every waveform of the project, in training as in prediction, comes through `load_waveform`, so that a backbone never
hears a recording at the wrong rate, with seconds of silence around it, or with numbers that are no audio.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import soundfile
import soxr
from librosa.effects import trim

from ser_ray.config import Audio
from ser_ray.schema import SAMPLING_RATE

MAX_MINUTES: Final = 10
"""A header that claims more is refused before anything is decoded: a claim costs nothing, memory does."""
MAX_VALUES: Final = MAX_MINUTES * 60 * 48_000 * 2
"""Frames x channels, 230 MB as float32: the same for a header with many channels or a very high rate."""
RATES: Final = (4_000, 768_000)
"""Hz. Outside, the header is nonsense."""
SILENCE_PEAK: Final = 10 ** (-60 / 20)
"""-60 dBFS: a peak of 33 of 32768, what is left of speech recorded with the microphone off."""
MARGIN: Final = int(0.05 * SAMPLING_RATE)
"""Samples kept around what trimming finds, so that soft onsets and releases survive."""


class Unusable(ValueError):  # noqa: N818 (a finding, not a failure)
    """A recording that is not used; the message is the reason, in words, without the path."""


def load_waveform(path: str | Path, audio: Audio) -> np.ndarray:
    """Read any recording as (T,) float32 mono at 16 kHz in [-1, 1], without the silence around it.

    Channels are averaged, rates converted by soxr (HQ), and leading and trailing parts more than ``audio.trim_db``
    below the loudest frame cut (`librosa.effects.trim`). What exceeds [-1, 1], as float files and resampling may, is
    scaled down, not clipped.

    Raises Unusable for a recording that cannot be decoded, is empty, not finite, silent, too short or too long.
    """
    values_TC, rate = _decode(path)
    waveform = values_TC.mean(axis=1)
    if not np.isfinite(waveform).all():
        raise Unusable("holds values that are not finite")
    if rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak < SILENCE_PEAK:
        raise Unusable("silent: the peak is below -60 dBFS")
    waveform = _trim(waveform / np.float32(max(peak, 1.0)), audio.trim_db)
    seconds = len(waveform) / SAMPLING_RATE
    trimmed = "" if audio.trim_db is None else " after trimming"
    if seconds < audio.min_seconds:
        raise Unusable(f"too short: {seconds:.2f} s{trimmed}, less than {audio.min_seconds:g} s")
    if seconds > audio.max_seconds:
        raise Unusable(f"too long: {seconds:.1f} s{trimmed}, more than {audio.max_seconds:g} s")
    return waveform


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(T,) float in [-1, 1] -> (T,) int16, little-endian, rounded and clipped; exact for what was 16 bit before.

    >>> to_int16(np.array([0.0, 0.5, 1.0, -1.0])).tolist()
    [0, 16384, 32767, -32768]
    """
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype("<i2")


def from_int16(buffer: bytes | pa.Buffer | np.ndarray) -> np.ndarray:
    """The bytes of T int16 -> (T,) float32 in [-1, 1).

    >>> from_int16(to_int16(np.array([0.25, -0.5]))).tolist()
    [0.25, -0.5]
    """
    return np.frombuffer(buffer, dtype="<i2").astype(np.float32) / np.float32(32768)


def _decode(path: str | Path) -> tuple[np.ndarray, int]:
    """(T, C) float32 and its rate; the header is checked first."""
    if not Path(path).is_file():
        raise Unusable("no such file")
    try:
        with soundfile.SoundFile(path) as file:
            minutes = file.frames / max(file.samplerate, 1) / 60
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise Unusable(f"claims a sampling rate of {file.samplerate} Hz")
            if minutes > MAX_MINUTES:
                raise Unusable(f"claims {minutes:.0f} minutes of audio, more than {MAX_MINUTES}")
            if file.frames * file.channels > MAX_VALUES:
                raise Unusable(f"claims {file.frames} frames of {file.channels} channels, too many to decode")
            values_TC, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        raise Unusable(f"cannot be decoded: {error.error_string}") from error
    if not len(values_TC):
        raise Unusable("empty: no audio in the file")
    return values_TC, rate


def _trim(waveform: np.ndarray, trim_db: float | None) -> np.ndarray:
    if trim_db is None:
        return waveform
    _, (start, end) = trim(waveform, top_db=trim_db)
    return waveform[max(0, start - MARGIN) : end + MARGIN]
