"""A recording of any length as the windows that a model can use, in bounded memory: for prediction.

It is cut as `audio.load_recording` cuts. A recording that is longer than `audio.MAX_MINUTES`, or does not say how long
it is, is decoded twice: to measure its level and where speech begins and ends, and for the windows.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import soxr

from ser_ray.config import Audio
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import audio as short
from ser_ray.speech.formats import Opened, Unusable, opened

STDIN: Final = Path("-")
"""In place of a path: standard input."""
PIECE: Final = 1024 * short.HOP
"""Samples measured or dropped at once: 33 s, 2 MB."""

BLOCK: Final = 2**20
"""Values decoded at once: 4 MB."""


@dataclass(frozen=True)
class Window:
    """A part of a recording, or all of it without its quiet ends."""

    waveform: np.ndarray
    """(T,) float32, mono, 16 kHz."""
    begin: int
    """Samples before it in the recording."""
    number: int
    """From 1; ``of``: how many there are."""
    of: int

    @property
    def start(self) -> float:
        """Seconds into the recording."""
        return self.begin / SAMPLING_RATE

    @property
    def end(self) -> float:
        """Seconds into the recording."""
        return (self.begin + len(self.waveform)) / SAMPLING_RATE


def load_windows(path: Path, audio: Audio) -> Iterator[Window]:
    """The equal windows of at most ``audio.max_seconds`` of a recording, whatever ``audio.too_long`` says.

    ``path`` may be a pipe, or ``-`` for standard input, of which a temporary copy is made. Raises Unusable as
    `audio.load_recording` does, perhaps after some windows.
    """
    with _on_disk(path) as file:
        short.check_file(file)
        with opened(file) as header:
            is_short = header.frames <= short.MAX_MINUTES * 60 * header.rate
        if is_short:
            yield from windows_of(short.load_recording(file, split(audio)))
        else:
            yield from _streamed(file, split(audio))


def windows_of(recording: short.Recording) -> Iterator[Window]:
    """The windows of a recording that is in memory."""
    begin = round(recording.start * SAMPLING_RATE)
    for number, waveform in enumerate(recording.windows, start=1):
        yield Window(waveform, begin, number, len(recording.windows))
        begin += len(waveform)


def split(audio: Audio) -> Audio:
    """The same settings, but recordings that are too long are cut."""
    return audio.model_copy(update={"too_long": "split"})


# -- below: how it is done


@contextmanager
def _on_disk(path: Path) -> Iterator[Path]:
    """The path itself; of a pipe, a temporary file with all that it gives, as audio is not read from front to back."""
    if path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise Unusable("standard input is a terminal; pipe a recording into the command")
        with _copy(sys.stdin.buffer) as copy:
            yield copy
    elif path.is_fifo():
        with path.open("rb") as pipe, _copy(pipe) as copy:
            yield copy
    else:
        yield path


@contextmanager
def _copy(source: BinaryIO) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="ser-ray-") as copy:
        try:
            shutil.copyfileobj(source, copy)
            copy.flush()
        except OSError as error:  # which itself does not say where
            raise OSError(error.errno, error.strerror, copy.name) from error
        yield Path(copy.name)


def _streamed(path: Path, audio: Audio) -> Iterator[Window]:
    begin, end, peak = _measured(path, audio)
    count = short.count_windows(end - begin, audio)
    sizes = [(end - begin) // count + (number < (end - begin) % count) for number in range(count)]
    before = [PIECE] * (begin // PIECE) + [begin % PIECE]  # in pieces, as a recording may begin with hours of silence
    with opened(path) as file:
        pieces = _cut(_resampled(_blocks(file), file.rate), [*before, *sizes])
        for _ in before:
            next(pieces)
        for number, waveform in enumerate(pieces, start=1):
            scaled = waveform / np.float32(peak) if peak > 1 else waveform
            yield Window(scaled, begin, number, count)
            begin += len(waveform)


def _measured(path: Path, audio: Audio) -> tuple[int, int, float]:
    """The samples at 16 kHz between which there is speech, and the peak of all."""
    decoded, resampled = _Level(), _Level()
    with opened(path) as file:
        short.check_rate(file.rate)
        blocks = _resampled(decoded.of(_blocks(file)), file.rate)
        energies = [short.hop_energies(piece) for piece in _cut(resampled.of(blocks), repeat(PIECE))]
    if not decoded.samples:
        raise Unusable("empty: no audio in the file")
    decoded.check()  # before resampling, which makes a ripple of a constant
    resampled.check()
    peak = max(resampled.high, -resampled.low)
    energy_H = np.concatenate(energies) / np.float32(max(peak, 1.0) ** 2)
    return *short.speech_bounds(energy_H, resampled.samples, audio.trim_db), peak


class _Level:
    """The level of a waveform that passes in blocks."""

    def __init__(self) -> None:
        self.samples, self.total, self.low, self.high = 0, 0.0, np.inf, -np.inf

    def of(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            if len(block):
                self.samples += len(block)
                self.total += float(block.sum(dtype=np.float64))
                self.low = float(np.minimum(self.low, block.min()))  # unlike min(), NaN if one is
                self.high = float(np.maximum(self.high, block.max()))
            yield block

    def check(self) -> None:
        short.check_level(self.low, self.high, self.total / self.samples)


def _blocks(file: Opened) -> Iterator[np.ndarray]:
    """(T,) float32 each: the mean over the channels, at the rate of the file."""
    for block_TC in file.blocks(0, max(1, BLOCK // file.channels)):
        yield short.mean_over_channels(block_TC)


def _resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _cut(blocks: Iterator[np.ndarray], sizes: Iterable[int]) -> Iterator[np.ndarray]:
    """The waveform of consecutive blocks in pieces of other sizes, as far as it reaches."""
    left = np.zeros(0, np.float32)
    for size in sizes:
        parts, length = [left], len(left)
        while length < size and (block := next(blocks, None)) is not None:
            parts.append(block)
            length += len(block)
        whole = np.concatenate(parts)
        piece, left = whole[:size], whole[size:]
        if size and not len(piece):
            return
        yield piece
