"""One recording -> checked waveforms: decode, downmix, resample, trim.

Every waveform of the project, in training as in prediction, is read here, so that a backbone never gets a recording at
the wrong rate, with seconds of silence around it, or with values that are not audio. A recording is refused with a
reason (`Unusable`) or used; a used recording that may be faulty is flagged. Whatever a file contains, memory is bounded
by `MAX_MINUTES` and `MAX_VALUES`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import soundfile
import soxr

from ser_ray.config import Audio
from ser_ray.schema import SAMPLING_RATE

MAX_MINUTES: Final = 10
"""A header that claims more is refused before anything is decoded, so that a false claim costs no memory. For a part
that is cut from a recording, only its own length counts."""
MAX_VALUES: Final = MAX_MINUTES * 60 * 48_000 * 2
"""Frames x channels: the same limit for a header with many channels or a very high rate."""
BLOCK: Final = 2**22
"""Values decoded at once: 16 MB, of which only the mean over the channels is kept."""
RATES: Final = (4_000, 768_000)
"""Hz. A header with a rate outside is invalid."""
SILENCE_PEAK: Final = 10 ** (-60 / 20)
"""-60 dBFS: a peak of 33 of 32768, as in a recording with the microphone off."""
MARGIN: Final = int(0.05 * SAMPLING_RATE)
"""Samples kept on both sides when trimming, so that soft onsets and releases survive."""
FRAME: Final = 2048
"""Samples over which trimming averages, every `HOP` samples. Both as in librosa."""
HOP: Final = 512
FULL_SCALE: Final = 0.99
"""Samples of at least this magnitude count as clipped; 8-bit recordings have no step above 0.992."""
CLIPPED_SHARE: Final = 0.001
"""Share of clipped samples in any channel from which a recording is flagged. Speech that was merely scaled to full
scale stays far below."""
SLACK: Final = 0.1
"""Seconds by which a header may be wrong about the length without a flag: MP3 encoders pad."""
MAX_CHUNKS: Final = 1000
"""Chunks of a WAV file that are read in search of its audio; a few are usual."""
CONTAINERS: Final = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".ogg": ("OGG",),
    ".opus": ("OGG",),
    ".mp3": ("MP3",),
    ".aiff": ("AIFF",),
    ".aif": ("AIFF",),
    ".au": ("AU",),
}
"""File suffix -> the containers that it stands for, by libsndfile's names."""


class Unusable(ValueError):  # noqa: N818 (a finding, not a failure)
    """A recording that is not used; the message is the reason, in words, without the path."""


@dataclass(frozen=True)
class Recording:
    """``windows``: (T,) float32 mono at 16 kHz each, several only if the recording was too long; ``flags``: what may be
    wrong with it, human-readable."""

    windows: tuple[np.ndarray, ...]
    flags: tuple[str, ...]


def load_recording(path: str | Path, audio: Audio, start: float | None = None, end: float | None = None) -> Recording:
    """Read any recording, or the part from ``start`` to ``end`` seconds, without the silence around it.

    Channels are averaged, the rate is converted by soxr (HQ), and leading and trailing parts more than
    ``audio.trim_db`` below the loudest frame are cut. A waveform that exceeds [-1, 1], as in float files or after
    resampling, is scaled down, not clipped. One that is longer than ``audio.max_seconds`` is split into equal windows
    if ``audio.too_long`` is "split". Flags report clipping, a header that is wrong about the length, a recording that
    ends before ``end``, and a container that does not match the file name.

    Raises Unusable for a recording that cannot be decoded, is empty, not finite, silent, too short or too long.
    """
    return _prepared(*_decode(Path(path), start, end), audio)


def _prepared(waveform: np.ndarray, rate: int, flags: tuple[str, ...], audio: Audio) -> Recording:
    if rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")
    peak = _peak(waveform)
    if not math.isfinite(peak):
        raise Unusable("holds values that are not finite")
    if peak < SILENCE_PEAK:
        raise Unusable("silent: the peak is below -60 dBFS")
    if peak > 1:
        waveform = waveform / np.float32(peak)
    waveform = _trim(waveform, audio.trim_db)
    seconds = len(waveform) / SAMPLING_RATE
    trimmed = "" if audio.trim_db is None else " after trimming"
    if seconds < audio.min_seconds:
        raise Unusable(f"too short: {seconds:.2f} s{trimmed}, less than {audio.min_seconds:g} s")
    if seconds <= audio.max_seconds:
        return Recording((waveform,), flags)
    if audio.too_long == "reject":
        raise Unusable(f"too long: {seconds:.1f} s{trimmed}, more than {audio.max_seconds:g} s")
    windows = np.array_split(waveform, -(-len(waveform) // int(audio.max_seconds * SAMPLING_RATE)))
    if len(windows[-1]) / SAMPLING_RATE < audio.min_seconds:
        raise Unusable(
            f"too long: {seconds:.1f} s{trimmed}, and its {len(windows)} equal windows are too short: "
            f"{seconds / len(windows):.2f} s, less than {audio.min_seconds:g} s"
        )
    return Recording(tuple(windows), flags)


def load_waveform(path: str | Path, audio: Audio, start: float | None = None, end: float | None = None) -> np.ndarray:
    """The waveform of a recording, (T,) float32: as `load_recording`, but a recording that is too long is refused."""
    (waveform,) = load_recording(path, audio.model_copy(update={"too_long": "reject"}), start, end).windows
    return waveform


def from_samples(samples: np.ndarray, sampling_rate: int, audio: Audio) -> np.ndarray:
    """Samples in memory as `load_waveform` would read them from a file: (T,) float in [-1, 1], or signed integers.

    Raises Unusable as it does, and for samples that are not one channel.
    """
    array = np.asarray(samples)
    if array.ndim != 1 or array.dtype.kind not in "fi":
        raise Unusable(f"has shape {array.shape} and type {array.dtype}; give one channel (T,) of float or signed int")
    if not RATES[0] <= sampling_rate <= RATES[1]:
        raise Unusable(f"has a sampling rate of {sampling_rate} Hz; give one from {RATES[0]} to {RATES[1]}")
    if not len(array):
        raise Unusable("is empty")
    if np.issubdtype(array.dtype, np.integer):
        array = array / -float(np.iinfo(array.dtype).min)
    whole = audio.model_copy(update={"too_long": "reject"})
    (waveform,) = _prepared(array.astype(np.float32), sampling_rate, (), whole).windows
    return waveform


def is_silent(waveform: np.ndarray) -> bool:
    """Whether the peak is below -60 dBFS.

    >>> is_silent(np.array([0.0, 0.0009])), is_silent(np.array([0.0, -0.0011]))
    (True, False)
    """
    return _peak(waveform) < SILENCE_PEAK


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """(T,) float in [-1, 1] -> (T,) int16, little-endian, rounded and clipped; exact for audio that was 16 bit before.

    >>> to_int16(np.array([0.0, 0.5, 1.0, -1.0])).tolist()
    [0, 16384, 32767, -32768]
    """
    scaled = waveform * np.float32(32768)
    return np.clip(np.rint(scaled, out=scaled), -32768, 32767, out=scaled).astype("<i2")


def from_int16(buffer: bytes | pa.Buffer | np.ndarray) -> np.ndarray:
    """The bytes of T int16 -> (T,) float32 in [-1, 1).

    >>> from_int16(to_int16(np.array([0.25, -0.5]))).tolist()
    [0.25, -0.5]
    """
    return np.frombuffer(buffer, dtype="<i2").astype(np.float32) / np.float32(32768)


def _decode(path: Path, start: float | None, end: float | None) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """(T,) float32 mono, its rate, and its flags; the header is checked first."""
    if not path.is_file():
        raise Unusable("no such file")
    if path.suffix.lower() == ".raw":
        raise Unusable("cannot be decoded: a .raw file does not say what it holds")
    try:
        with soundfile.SoundFile(path) as file:
            first, count = _part(file, start, end)
            waveform, clipped = _read(file, first, count)
            rate, container = file.samplerate, file.format
    except soundfile.LibsndfileError as error:
        raise Unusable(f"cannot be decoded: {error.error_string}") from error
    if not len(waveform):
        raise Unusable("empty: no audio in the file")
    flags = [f"clipped: {clipped:.1%} of the samples at full scale"] if clipped >= CLIPPED_SHARE else []
    if container not in CONTAINERS.get(path.suffix.lower(), (container,)):
        flags.append(f"named {path.suffix}, but holds {container}")
    if count - len(waveform) > SLACK * rate:
        flags.append(f"the header claims {count / rate:.1f} s, the file holds {len(waveform) / rate:.1f} s")
    if end is not None and end * rate - (first + count) > SLACK * rate:
        flags.append(f"should end at {end:g} s, but the recording ends at {(first + count) / rate:.2f} s")
    return waveform, rate, (*flags, *_wav_length(path))


def _part(file: soundfile.SoundFile, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame to read and the number of frames, by the length that the header claims."""
    rate = file.samplerate
    if not RATES[0] <= rate <= RATES[1]:
        raise Unusable(f"claims a sampling rate of {rate} Hz")
    begin, stop = start or 0.0, math.inf if end is None else end
    if not 0 <= begin < stop:
        raise Unusable(f"a part from {begin:g} to {stop:g} s is invalid")
    first, last = (round(min(seconds * rate, file.frames)) for seconds in (begin, stop))
    if first and first == last:
        raise Unusable(f"begins at {begin:g} s, but the recording ends at {file.frames / rate:.2f} s")
    count = last - first
    if count / rate / 60 > MAX_MINUTES:
        raise Unusable(f"claims {count / rate / 60:.0f} minutes of audio, more than {MAX_MINUTES}")
    if count * file.channels > MAX_VALUES:
        raise Unusable(f"claims {count} frames of {file.channels} channels, too many to decode")
    return first, count


def _read(file: soundfile.SoundFile, first: int, count: int) -> tuple[np.ndarray, float]:
    """(T,) float32, the mean over the channels, and the share of clipped samples in the worst channel.

    Read block by block, so that a header that claims too much costs no memory.
    """
    if first:
        file.seek(first)
    blocks: list[np.ndarray] = []
    clipped_C = np.zeros(file.channels, np.int64)
    while count > 0:
        block_TC = file.read(min(count, max(1, BLOCK // file.channels)), dtype="float32", always_2d=True)
        if not len(block_TC):
            break
        count -= len(block_TC)
        if _peak(block_TC) >= FULL_SCALE:  # so that most recordings need no count
            clipped_C += np.count_nonzero(np.abs(block_TC) >= FULL_SCALE, axis=0)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller checks the result
            blocks.append(block_TC[:, 0] if file.channels == 1 else block_TC.mean(axis=1))
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return waveform, float(clipped_C.max()) / max(len(waveform), 1)


def _wav_length(path: Path) -> Sequence[str]:
    """Flags for a wrong length of the audio in a WAV header; decoding stops silently where header or file ends."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        header = file.read(12)
        if header[:4] != b"RIFF" or header[8:] != b"WAVE":
            return ()
        for _ in range(MAX_CHUNKS):
            if len(chunk := file.read(8)) < 8:
                break
            name, claimed = struct.unpack("<4sI", chunk)
            held = size - file.tell()
            file.seek(claimed + claimed % 2, 1)  # chunks begin at even offsets
            if name != b"data":
                continue
            if claimed > held:
                return (f"the header claims {claimed} bytes of audio, the file holds {held}",)
            following = file.read(4)
            more = len(following) == 4 and not (following.isascii() and following.decode("ascii").isprintable())
            return (f"the header claims {claimed} bytes of audio, the file holds more",) if more else ()
    return ()


def _peak(waveform: np.ndarray) -> float:
    """The largest absolute value, without a copy; not finite if any value is not."""
    return float(max(waveform.max(initial=0.0), -waveform.min(initial=0.0)))


def _trim(waveform: np.ndarray, trim_db: float | None) -> np.ndarray:
    """Cut the quiet ends as librosa.effects.trim does, which itself takes seconds to import and compile."""
    if trim_db is None:
        return waveform
    # A frame is a run of hops, so each sample is squared once: F frames, H hops.
    padded = np.zeros((len(waveform) // HOP + FRAME // HOP) * HOP, np.float32)
    padded[FRAME // 2 : FRAME // 2 + len(waveform)] = waveform[: len(padded) - FRAME // 2]
    hops_HT = padded.reshape(-1, HOP)
    energy_H = np.einsum("ht,ht->h", hops_HT, hops_HT)
    power_F = np.convolve(energy_H, np.ones(FRAME // HOP, np.float32), mode="valid") / FRAME
    power_F = np.maximum(power_F, 1e-10)  # -100 dB, the floor of librosa's decibels
    loud = np.flatnonzero(10 * np.log10(power_F / power_F.max()) > -trim_db)
    start, end = loud[0] * HOP, (loud[-1] + 1) * HOP
    return waveform[max(0, start - MARGIN) : min(end, len(waveform)) + MARGIN]
