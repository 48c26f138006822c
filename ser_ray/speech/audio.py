"""One recording -> checked waveforms: decode, downmix, resample, trim.

Every waveform of the project, in training as in prediction, is read here, so that a backbone never gets a recording at
the wrong rate, with seconds of silence around it, or with values that are not audio. A recording is refused with a
reason (`Unusable`) or used; a used recording that may be faulty is flagged. Whatever a file contains, memory is bounded
by `MAX_MINUTES` and `MAX_VALUES`.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import soxr

from ser_ray.config import Audio
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech.formats import CONTAINERS, Opened, Unusable, opened, wav_data

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
NO_FILE: Final = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EILSEQ})
"""Errors of one file that another does not have; those of a disk end the command."""


@dataclass(frozen=True)
class Recording:
    """``windows``: (T,) float32 mono at 16 kHz each, several only if the recording was too long; ``flags``: what may be
    wrong with it, human-readable; ``start``: seconds that were cut before the first window."""

    windows: tuple[np.ndarray, ...]
    flags: tuple[str, ...] = ()
    start: float = 0.0


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


def load_waveform(path: str | Path, audio: Audio, start: float | None = None, end: float | None = None) -> np.ndarray:
    """The waveform of a recording, (T,) float32: as `load_recording`, but a recording that is too long is refused."""
    (waveform,) = load_recording(path, audio.model_copy(update={"too_long": "reject"}), start, end).windows
    return waveform


def from_samples(samples: np.ndarray, sampling_rate: int, audio: Audio) -> Recording:
    """Samples in memory as `load_recording` would read them from a file: (T,) float in [-1, 1], or signed integers.

    Raises Unusable as it does, and for samples that are not one channel.
    """
    array = np.asarray(samples)
    if array.ndim != 1 or array.dtype.kind not in "fi":
        raise Unusable(f"has shape {array.shape} and type {array.dtype}; give one channel (T,) of float or signed int")
    check_rate(sampling_rate)
    if not len(array):
        raise Unusable("empty: no samples")
    if np.issubdtype(array.dtype, np.integer):
        array = array / -float(np.iinfo(array.dtype).min)
    return _prepared(array.astype(np.float32), sampling_rate, (), audio)


def check_file(path: Path) -> None:
    """Raises Unusable for what is no file, or does not say what it holds."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):  # a name with a null byte
        raise Unusable("no such file") from None
    if stat.S_ISDIR(mode):
        raise Unusable("a folder without recordings")
    if not stat.S_ISREG(mode):
        raise Unusable("not a file, but a device, a pipe or a socket")
    if path.suffix.lower() == ".raw":
        raise Unusable("cannot be decoded: a .raw file does not say what it holds")


def check_rate(rate: int) -> None:
    """Raises Unusable for a sampling rate that no recording has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise Unusable(f"claims a sampling rate of {rate} Hz, which is not between {RATES[0]} and {RATES[1]}")


def check_level(low: float, high: float, mean: float) -> None:
    """Raises Unusable for a recording that is silent, or not finite, by its least, largest and mean value.

    The level is that without the mean: a microphone that is off may still give a constant.

    >>> check_level(0.1, 0.1005, 0.1)
    Traceback (most recent call last):
    ser_ray.speech.formats.Unusable: silent: the peak is below -60 dBFS
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unusable("holds values that are not finite")
    if max(high - mean, mean - low) < SILENCE_PEAK:
        raise Unusable("silent: the peak is below -60 dBFS")


def mean_over_channels(block_TC: np.ndarray) -> np.ndarray:
    """(T, C) -> (T,)."""
    with np.errstate(invalid="ignore", over="ignore"):  # `check_level` follows
        return block_TC[:, 0] if block_TC.shape[1] == 1 else block_TC.mean(axis=1)


def hop_energies(waveform: np.ndarray) -> np.ndarray:
    """(T,) -> (H,): the sum of squares of every `HOP` samples, the last of them padded with zeros."""
    if len(waveform) % HOP:
        waveform = np.concatenate((waveform, np.zeros(-len(waveform) % HOP, np.float32)))
    hops_HT = waveform.reshape(-1, HOP)
    return np.einsum("ht,ht->h", hops_HT, hops_HT)


def speech_bounds(energy_H: np.ndarray, samples: int, trim_db: float | None) -> tuple[int, int]:
    """The first sample between the quiet ends, and that after the last, by the `hop_energies` of a waveform.

    As librosa.effects.trim, which itself takes seconds to import and compile: F frames of `FRAME` samples.
    """
    if trim_db is None:
        return 0, samples
    hops = FRAME // HOP
    padded_H = np.zeros(samples // HOP + hops, np.float32)
    padded_H[hops // 2 : hops // 2 + len(energy_H)] = energy_H
    power_F = np.convolve(padded_H, np.ones(hops, np.float32), mode="valid") / FRAME
    power_F = np.maximum(power_F, 1e-10)  # -100 dB, the floor of librosa's decibels
    loud = np.flatnonzero(10 * np.log10(power_F / power_F.max()) > -trim_db)
    start, end = int(loud[0]) * HOP, int(loud[-1] + 1) * HOP
    return max(0, start - MARGIN), min(min(end, samples) + MARGIN, samples)


def count_windows(samples: int, audio: Audio) -> int:
    """How many windows a trimmed waveform of so many samples is split into: equal ones of at most ``max_seconds``.

    Raises Unusable for one that is too short, or too long where ``too_long`` is "reject".
    """
    seconds = samples / SAMPLING_RATE
    trimmed = "" if audio.trim_db is None else " after trimming"
    if seconds < audio.min_seconds:
        raise Unusable(f"too short: {seconds:.2f} s{trimmed}, less than {audio.min_seconds:g} s")
    if seconds <= audio.max_seconds:
        return 1
    if audio.too_long == "reject":
        raise Unusable(f"too long: {seconds:.1f} s{trimmed}, more than {audio.max_seconds:g} s")
    windows = -(-samples // int(audio.max_seconds * SAMPLING_RATE))
    if samples // windows / SAMPLING_RATE < audio.min_seconds:
        raise Unusable(
            f"too long: {seconds:.1f} s{trimmed}, and its {windows} equal windows are too short: "
            f"{seconds / windows:.2f} s, less than {audio.min_seconds:g} s"
        )
    return windows


def is_silent(waveform: np.ndarray) -> bool:
    """Whether the peak is below -60 dBFS, without a constant offset.

    >>> is_silent(np.array([0.5, 0.5009])), is_silent(np.array([0.0, 0.0, 0.0, -0.0015]))
    (True, False)
    """
    try:
        check_level(*_level(waveform))
    except Unusable:
        return True
    return False


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


def _prepared(waveform: np.ndarray, rate: int, flags: tuple[str, ...], audio: Audio) -> Recording:
    check_level(*_level(waveform))  # before resampling, which makes a ripple of a constant
    if rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")
        check_level(*_level(waveform))  # what is above 8 kHz is gone
    if (peak := _peak(waveform)) > 1:
        waveform = waveform / np.float32(peak)
    start, end = speech_bounds(hop_energies(waveform), len(waveform), audio.trim_db)
    waveform = waveform[start:end]
    windows = np.array_split(waveform, count_windows(len(waveform), audio))
    return Recording(tuple(windows), flags, start / SAMPLING_RATE)


def _decode(path: Path, start: float | None, end: float | None) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """(T,) float32 mono, its rate, and its flags; the header is checked first."""
    try:
        check_file(path)
        with opened(path) as file:
            first, count = _part(file, start, end)
            waveform, clipped = _read(file, first, count)
        length = _wav_length(path)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise Unusable(f"cannot be read: {os.strerror(error.errno)}") from error
    rate = file.rate
    if not len(waveform):
        raise Unusable(
            f"begins at {start:g} s, but the recording ends before" if first else "empty: no audio in the file"
        )
    flags = [f"clipped: {clipped:.1%} of the samples at full scale"] if clipped >= CLIPPED_SHARE else []
    if file.container not in CONTAINERS.get(path.suffix.lower(), (file.container,)):
        flags.append(f"named {path.suffix}, but holds {file.container}")
    if math.isinf(file.frames):  # only now it is known where it ends
        count = len(waveform)
    if count - len(waveform) > SLACK * rate:
        flags.append(f"the header claims {count / rate:.1f} s, the file holds {len(waveform) / rate:.1f} s")
    if end is not None and end * rate - (first + count) > SLACK * rate:
        flags.append(f"should end at {end:g} s, but the recording ends at {(first + count) / rate:.2f} s")
    return waveform, rate, (*flags, *length)


def _part(file: Opened, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame to read and the most frames to read, by the length that the header claims."""
    rate = file.rate
    check_rate(rate)
    begin, stop = start or 0.0, math.inf if end is None else end
    if not 0 <= begin < stop:
        raise Unusable(f"a part from {begin:g} to {stop:g} s is invalid")
    first, last = (min(seconds * rate, file.frames) for seconds in (begin, stop))
    if first and first == last:
        raise Unusable(f"begins at {begin:g} s, but the recording ends at {file.frames / rate:.2f} s")
    most = MAX_MINUTES * 60 * rate
    if math.isinf(last):
        count = most + 1  # `_read` refuses it if it is there
    else:
        count = round(last) - round(first)
        if count > most:
            raise Unusable(f"claims {count / rate / 60:.0f} minutes of audio, more than {MAX_MINUTES}")
    if count * file.channels > MAX_VALUES + file.channels:
        raise Unusable(f"claims {count} frames of {file.channels} channels, too many to decode")
    return round(first), count


def _read(file: Opened, first: int, count: int) -> tuple[np.ndarray, float]:
    """(T,) float32, the mean over the channels, and the share of clipped samples in the worst channel.

    Read block by block, so that a header that claims too much costs no memory.
    """
    blocks: list[np.ndarray] = []
    clipped_C = np.zeros(file.channels, np.int64)
    missing = count
    size = min(count, max(1, BLOCK // file.channels))
    for block_TC in file.blocks(first, size) if count else ():
        block_TC = block_TC[:missing]
        if _peak(block_TC) >= FULL_SCALE:  # so that most recordings need no count
            clipped_C += np.count_nonzero(np.abs(block_TC) >= FULL_SCALE, axis=0)
        blocks.append(mean_over_channels(block_TC))
        if not (missing := missing - len(block_TC)):
            break
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(waveform) > MAX_MINUTES * 60 * file.rate:
        raise Unusable(f"holds more than {MAX_MINUTES} minutes of audio")
    return waveform, float(clipped_C.max()) / max(len(waveform), 1)


def _wav_length(path: Path) -> Sequence[str]:
    """Flags for a wrong length of the audio in a WAV header; decoding stops silently where header or file ends."""
    with path.open("rb") as file:
        data = wav_data(file)
        if data is None:
            return ()
        if data.held and not data.claimed:
            return ("the header gives no length, as from a pipe: read to the end",)
        if data.claimed > data.held:
            return (f"the header claims {data.claimed} bytes of audio, the file holds {data.held}",)
        file.seek(data.place + 4 + data.claimed + data.claimed % 2)
        following = file.read(4)
        more = len(following) == 4 and not (following.isascii() and following.decode("ascii").isprintable())
        return (f"the header claims {data.claimed} bytes of audio, the file holds more",) if more else ()


def _peak(waveform: np.ndarray) -> float:
    """The largest absolute value, without a copy; not finite if any value is not."""
    return float(max(waveform.max(initial=0.0), -waveform.min(initial=0.0)))


def _level(waveform: np.ndarray) -> tuple[float, float, float]:
    """The least, largest and mean value; as float64, in which the mean of a constant is that constant."""
    return float(waveform.min()), float(waveform.max()), float(waveform.mean(dtype=np.float64))
