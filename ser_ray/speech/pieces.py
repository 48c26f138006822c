"""Recordings as the pieces that a model answers: windows, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ser_ray.config import Audio
from ser_ray.disk import readable
from ser_ray.speech.audio import Unusable, from_samples, is_silent, to_int16
from ser_ray.speech.long import Window, load_windows, split, windows_of

Source = Path | tuple[np.ndarray, int]
"""A file, or samples (T,) and their sampling rate in Hz."""


@dataclass(frozen=True)
class Piece:
    """A window that waits for its answer, or the reason why there is none."""

    path: str
    samples: np.ndarray | None
    """(T,) int16."""
    reason: str = ""
    start: float | None = None
    end: float | None = None
    number: int = 1
    of: int = 1
    source: int = 0
    """The number of its recording among all, from 0."""


def pieces_of(audio: Audio, sources: Sequence[Source]) -> Iterator[Piece]:
    """The windows of all recordings; whatever is wrong with one recording, the others follow.

    ``audio``: that of the model's experiment.
    """
    for place, source in enumerate(sources):
        path = readable(source) if isinstance(source, Path) else ""
        try:
            for window in _windows(source, audio):
                times = (window.start, window.end, window.number, window.of, place)
                if window.of > 1 and is_silent(window.waveform):
                    yield Piece(path, None, "silent: the window's peak is below -60 dBFS", *times)
                else:
                    yield Piece(path, to_int16(window.waveform), "", *times)
        except Unusable as error:
            yield Piece(path, None, str(error), source=place)
        except OSError as error:
            where = f"{error.filename}: " if error.filename and error.filename != str(source) else ""
            reason = f"cannot be read: {where}{os.strerror(error.errno or 0)}"
            yield Piece(path, None, reason, source=place)


# -- below: how it is done


def _windows(source: Source, audio: Audio) -> Iterator[Window]:
    if isinstance(source, Path):
        return load_windows(source, audio)
    return windows_of(from_samples(*source, split(audio)))
