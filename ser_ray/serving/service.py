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
from ser_ray.schema import SAMPLING_RATE
from ser_ray.serving import about, messages
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

    def in_full(self, name: str) -> dict[str, Any]:
        """For POST /v1/predict."""
        line = messages.in_full(self.whole) | {"windows": [messages.in_full(window) for window in self.windows]}
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
        values: list[list[float]] = [[] for _ in windows]
        vectors: list[np.ndarray | None] = [None] * len(windows)
        said = ""
        asked = list(jobs_of(model, windows, voice, embedding))
        for (places, _), reply in zip(asked, await self._replies([job for _, job in asked]), strict=True):
            said = reply.said
            for row, place in enumerate(places):
                values[place] = reply.probabilities[row]
                vectors[place] = None if reply.pooled_NP is None else reply.pooled_NP[row]
        emotions, left = self.models[model]["emotions"], iter(zip(values, vectors, strict=True))
        answered = [
            _recording(pieces, [next(left) if _used(p) else ([], None) for p in pieces], emotions, said)
            for pieces in found
        ]
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

    async def window(self, model: str, piece: Piece, voice: dict[str, Any] | None) -> Answer:
        """The answer for a window of a stream."""
        values: list[float] = []
        if piece.samples is not None:
            (reply,) = await self._replies([Job(model, (piece.samples,), voice)])
            values = reply.probabilities[0]
            self.measures.audio.inc(len(piece.samples) / SAMPLING_RATE)
        return answer_of(piece, values, self.models[model]["emotions"])

    async def _decoded(self, model: str, recordings: Sequence[bytes]) -> list[list[Piece]]:
        if len(recordings) > self.limits.recordings:
            raise Refused(413, f"more than {self.limits.recordings} recordings in a request")
        found = await asyncio.gather(*(self.decoders.pieces(each, self.audio[model]) for each in recordings))
        seconds = sum(len(p.samples) for pieces in found for p in pieces if p.samples is not None) / SAMPLING_RATE
        if seconds > self.limits.seconds:
            raise Refused(413, f"more than {self.limits.seconds:g} s of audio in a request")
        self.measures.audio.inc(seconds)
        return found

    async def _replies(self, jobs: Sequence[Job]) -> list[Reply]:
        return list(await self._within(asyncio.gather(*(self.backend.answer(job) for job in jobs))))

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


def _recording(
    pieces: Sequence[Piece],
    found: Sequence[tuple[list[float], np.ndarray | None]],
    emotions: Sequence[str],
    said: str,
) -> Answered:
    answers = [answer_of(piece, values, emotions) for piece, (values, _) in zip(pieces, found, strict=True)]
    *_, whole = with_whole(zip(pieces, answers, strict=True))
    windows = [answer for answer in answers if answer.start is not None]
    vectors = [vector_P for _, vector_P in found if vector_P is not None]
    return Answered(whole, windows, mean_of_finite(vectors) if vectors else None, said)
