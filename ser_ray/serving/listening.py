"""A stream of speech as it arrives: every second there is a window of the last few to be answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from ser_ray.config import Audio
from ser_ray.serving.limits import Refused
from ser_ray.speech.pieces import Piece, pieces_of

EVERY: Final = 1.0
"""Seconds between two answers: emotion does not change faster, and a person can follow it."""
LEAD_S: Final = 10.0
"""Seconds by which a stream may be ahead of the clock: what a browser had buffered while a connection was slow."""


class Listening:
    """What was said last in one stream; older samples are dropped, so memory is bounded whatever arrives.

    ``window``: the seconds of an answer, at most ``audio.max_seconds`` of the model.
    """

    def __init__(self, rate: int, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.window, self.clock = rate, round(window * rate), clock
        self.begun = clock()
        self.samples = np.zeros(0, "<i2")
        self.total = 0
        self.answered = 0

    def add(self, pcm: bytes) -> None:
        """Add what arrived. Raises Refused for half a sample (422), and for a stream faster than speech (429)."""
        if len(pcm) % 2:
            raise Refused(422, "PCM is int16: a message has an even number of bytes")
        self.samples = np.concatenate((self.samples, np.frombuffer(pcm, "<i2")))[-self.window :]
        self.total += len(pcm) // 2
        if self.seconds > self.clock() - self.begun + LEAD_S:
            raise Refused(429, f"a stream is live: this one is more than {LEAD_S:g} s ahead of the clock", 10)

    @property
    def seconds(self) -> float:
        """Of the stream so far."""
        return self.total / self.rate

    @property
    def waiting(self) -> int:
        """How many answers are due: more than one where the answers are slower than the speech."""
        return int((self.total - self.answered) / (EVERY * self.rate))

    def due(self, audio: Audio) -> tuple[Piece, int]:
        """The newest window as a piece to be answered, with its seconds in the stream, and how many were skipped."""
        skipped = max(0, self.waiting - 1)
        self.answered += int(self.waiting * EVERY * self.rate)
        end = self.total / self.rate
        start = (self.total - len(self.samples)) / self.rate
        (piece,) = pieces_of(audio, [(self.samples, self.rate)])
        return Piece("", piece.samples, piece.reason, start, end), skipped
