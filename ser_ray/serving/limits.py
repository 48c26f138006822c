"""What one request, one stream and one client may ask for; each limit with its default and the reason for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ser_ray.schema import UserError


class Refused(Exception):  # noqa: N818 (an answer, not a failure)
    """A request that is not served: the HTTP status, and why, in one line without anything of the request in it."""

    def __init__(self, status: int, reason: str, wait_s: int | None = None) -> None:
        super().__init__(status, reason, wait_s)  # all of them, so that it can be sent between processes
        self.status, self.reason, self.wait_s = status, reason, wait_s


class Limits(BaseModel):
    """Set by ``ser-ray serve --limit NAME=VALUE``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    megabytes: float = Field(32, gt=0, le=1000)
    """Of a request. 300 s of speech as 16-bit stereo at 44.1 kHz are 53 MB, but as mono 26 MB, in base64 35 MB; of
    compressed speech it is hours."""
    seconds: float = Field(300, gt=0, le=36_000)
    """Of audio in a request, all recordings together: what one client can make the others wait for. For an hour of
    speech there is `ser-ray predict`."""
    recordings: int = Field(64, gt=0, le=1000)
    """Of a request: a batch of the model holds about as many utterances of 2 s."""
    decode_seconds: float = Field(10, gt=0)
    """For one recording: far more than 300 s of any format take. What takes longer was made to, and its decoder is
    ended."""
    receive_seconds: float = Field(30, gt=0)
    """From the first to the last byte of a request: the largest one, at 9 Mbit/s. Slower clients hold memory."""
    answer_seconds: float = Field(60, gt=0)
    """For the model, waiting included: browsers and proxies give up after about a minute."""
    queue: int = Field(256, gt=0)
    """Requests that are being served at once. At four times as many as 64 clients have under way, those that come later
    would wait for seconds: they are told to come again."""
    queue_megabytes: float = Field(512, gt=0)
    """Of all requests being served at once, by what they say of their length: memory that is surely there."""
    connections: int = Field(32, gt=0)
    """Streams at once: each has a window of 3 s answered every second, so that 32 of them are 96 s of speech a second,
    about what a small model answers on two cores."""
    stream_minutes: float = Field(60, gt=0)
    """Of a stream. One that is never closed would hold its place for ever."""
    requests_per_minute: float = Field(600, gt=0)
    """Of a key, over time; a stream counts as one. Ten a second are more than a person, a page or a telephone line
    asks for, and leave room for others."""
    burst: int = Field(60, gt=0)
    """Requests of a key at once, after a rest: a folder of recordings."""
    models: int = Field(4, gt=0)
    """Checkpoints in memory at once; the least recently used one is dropped for another. Four encoders of 100 M
    parameters are 1.6 GB."""


def read_limits(given: Sequence[str]) -> Limits:
    """Limits from ``NAME=VALUE``. Raises UserError, in one line, for what is none.

    >>> read_limits(["seconds=60"]).seconds
    60.0
    """
    pairs = [one.partition("=")[::2] for one in given]
    try:
        return Limits.model_validate(dict(pairs))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"--limit {name}: there is no such limit; there are {', '.join(Limits.model_fields)}"
            ) from None
        raise UserError(f"--limit {name}: {first['msg']}") from None


class Rates:
    """How many requests each client may still make: a bucket that holds ``burst`` of them and is filled steadily."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self.burst, self.clock = limits.requests_per_minute / 60, limits.burst, clock
        self.buckets: dict[str, tuple[float, float]] = {}

    def count(self, client: str) -> None:
        """Count a request of a client. Raises Refused (429) where there were too many."""
        now = self.clock()
        left, since = self.buckets.get(client, (float(self.burst), now))
        left = min(float(self.burst), left + (now - since) * self.per_second)
        if left < 1:
            wait_s = int((1 - left) / self.per_second) + 1
            raise Refused(429, f"too many requests with this key; the next one in {wait_s} s", wait_s)
        self.buckets[client] = (left - 1, now)


class Room:
    """What is being served at once."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests, self.streams, self.bytes = 0, 0, 0

    def enter(self, size: int) -> None:
        """Let a request of so many bytes in. Raises Refused (503) where there is no room."""
        full = self.bytes + size > self.limits.queue_megabytes * 1e6
        if self.requests >= self.limits.queue or (self.requests and full):
            raise Refused(503, f"{self.requests} requests are being served, and there is no room for more", 1)
        self.requests += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """It has its answer."""
        self.requests -= 1
        self.bytes -= size

    def open_stream(self) -> None:
        """Raises Refused (503) where there are too many streams."""
        if self.streams >= self.limits.connections:
            raise Refused(503, f"{self.streams} streams are open, and there is no room for more", 10)
        self.streams += 1

    def close_stream(self) -> None:
        """It has ended."""
        self.streams -= 1


def one_line(reason: Any) -> str:
    """A reason as one short line."""
    return " ".join(str(reason).split())[:300]
