"""Recordings of a request to their answers: decoded, cut into windows, answered in batches with those of others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ser_ray import config
from ser_ray.config import Audio
from ser_ray.models import about
from ser_ray.schema import SAMPLING_RATE
from ser_ray.serving import messages
from ser_ray.serving.answering import Job, Reply, jobs_of
from ser_ray.serving.decoding import Decoders
from ser_ray.serving.guard import Measures
from ser_ray.serving.limits import Limits, Refused
from ser_ray.serving.settings import Settings
from ser_ray.speech.pieces import Piece
from ser_ray.training.inference import Answer, answer_of, mean_of_finite, with_whole

DECODERS = 2
"""Processes that decode: one recording that was made to take long leaves the other to the rest. Each takes about
150 MB; a usual recording is decoded in milliseconds, so that two keep up with a GPU."""


class Backend(Protocol):
    """What has the models. What it cannot answer it raises as Refused."""

    async def answer(self, job: Job) -> Reply:
        """A reply to a job."""

    async def enrol(self, model: str, windows: Sequence[np.ndarray], name: str) -> dict[str, Any]:
        """The voice of the one speaker of all windows."""

    async def is_ready(self) -> bool:
        """Whether it would answer now."""


@dataclass(frozen=True)
class Answered:
    """A recording."""

    whole: Answer
    windows: list[Answer]
    """With their times."""
    embedding_P: np.ndarray | None
    said: str
    least: float | None
    """See `Reply`."""

    def in_full(self, name: str) -> dict[str, Any]:
        """For POST /v1/predict."""
        line = messages.in_full(self.whole, self.least)
        line["windows"] = [messages.in_full(window, self.least) for window in self.windows]
        if self.embedding_P is not None:
            finite = np.isfinite(self.embedding_P).all()
            line["embedding"] = self.embedding_P.tolist() if finite else None
        if self.said:
            line["voice"] = self.said
        return ({"name": name} if name else {}) | line


class Service:
    """The models of a server, as clients see them."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.limits: Limits = settings.limits
        self.backend, self.measures = backend, Measures()
        self.decoders = Decoders(DECODERS, settings.limits)
        self.models = {name: about.model_of(name, Path(path)) for name, path in settings.checkpoints.items()}
        self.audio: Mapping[str, Audio] = {
            name: config.load_experiment(Path(path) / "experiment.yaml").audio
            for name, path in settings.checkpoints.items()
        }

    def named(self, model: str | None) -> str:
        """A model's name; that of the first without one. Raises Refused (422) where there is none."""
        if model is None:
            return next(iter(self.models))
        if model not in self.models:
            raise Refused(422, "model: there is none of that name; see GET /v1/models")
        return model

    async def predicted(
        self,
        model: str,
        recordings: Sequence[bytes],
        voice: dict[str, Any] | None = None,
        embedding: bool = False,
    ) -> list[Answered]:
        """An answer for each recording. Raises Refused (415, 422) where no recording can be used."""
        found = await self._decoded(model, recordings)
        windows = [piece.samples for pieces in found for piece in pieces if piece.samples is not None]
        reply = await self._reply(model, windows, voice, embedding)
        emotions, answered, begin = self.models[model]["emotions"], [], 0
        for pieces in found:
            end = begin + sum(map(_used, pieces))
            answered.append(_recording(pieces, reply, slice(begin, end), emotions))
            begin = end
        if not any(one.whole.probabilities for one in answered):
            reason = answered[0].whole.reason
            raise Refused(messages.status_of(reason), reason)
        return answered

    async def enrolled(self, model: str, recordings: Sequence[bytes], name: str) -> dict[str, Any]:
        """The voice of the one speaker of all recordings. Raises Refused (415, 422) where one cannot be used."""
        found = await self._decoded(model, recordings)
        for number, pieces in enumerate(found):
            if not any(map(_used, pieces)):
                reason = pieces[-1].reason
                raise Refused(messages.status_of(reason), f"files.{number}: {reason}")
        windows = [piece.samples for pieces in found for piece in pieces if piece.samples is not None]
        return await self._within(self.backend.enrol(model, windows, name))

    async def window(self, model: str, piece: Piece, voice: dict[str, Any] | None) -> dict[str, Any]:
        """The answer for a window of a stream, as JSON."""
        windows = [] if piece.samples is None else [piece.samples]
        reply = await self._reply(model, windows, voice, embedding=False)
        self.measures.audio.inc(sum(map(len, windows)) / SAMPLING_RATE)
        values = reply.probabilities[0] if windows else []
        return messages.in_full(answer_of(piece, values, self.models[model]["emotions"]), reply.least)

    async def _decoded(self, model: str, recordings: Sequence[bytes]) -> list[list[Piece]]:
        if len(recordings) > self.limits.recordings:
            raise Refused(413, f"more than {self.limits.recordings} recordings in a request")
        found = await asyncio.gather(*(self.decoders.pieces(each, self.audio[model]) for each in recordings))
        seconds = sum(len(p.samples) for pieces in found for p in pieces if p.samples is not None) / SAMPLING_RATE
        if seconds > self.limits.seconds:
            raise Refused(413, f"more than {self.limits.seconds:g} s of audio in a request")
        self.measures.audio.inc(seconds)
        return found

    async def _reply(
        self, model: str, windows: Sequence[np.ndarray], voice: dict[str, Any] | None, embedding: bool
    ) -> Reply:
        """One reply to all windows, which are asked as several jobs where they are too many for one batch."""
        asked = list(jobs_of(model, windows, voice, embedding))
        jobs = [self.backend.answer(job) for _, job in asked]
        replies: list[Reply] = await self._within(asyncio.gather(*jobs)) if jobs else []
        if not replies:
            return Reply([], None)
        order = np.argsort(np.concatenate([places for places, _ in asked]))
        values = [own for reply in replies for own in reply.probabilities]
        vectors = [reply.pooled_NP for reply in replies if reply.pooled_NP is not None]
        pooled_NP = np.concatenate(vectors)[order] if vectors else None
        return Reply([values[place] for place in order], pooled_NP, replies[0].said, replies[0].least)

    async def _within(self, work: Any) -> Any:
        try:
            return await asyncio.wait_for(work, self.limits.answer_seconds)
        except TimeoutError:
            raise Refused(
                503, f"no answer within {self.limits.answer_seconds:g} s; there is too much to do", 5
            ) from None


# -- below: how it is done


def _used(piece: Piece) -> bool:
    return piece.samples is not None


def _recording(pieces: Sequence[Piece], reply: Reply, own: slice, emotions: Sequence[str]) -> Answered:
    """The answer for the recording whose windows have the places ``own`` in a reply."""
    left = iter(reply.probabilities[own])
    answers = [answer_of(piece, next(left) if _used(piece) else [], emotions) for piece in pieces]
    *_, whole = with_whole(zip(pieces, answers, strict=True))
    windows = [answer for answer in answers if answer.start is not None]
    vectors = [] if reply.pooled_NP is None else list(reply.pooled_NP[own])
    return Answered(whole, windows, mean_of_finite(vectors) if vectors else None, reply.said, reply.least)
