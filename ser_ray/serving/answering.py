"""Windows of several requests answered together: each as if it were alone, since models see its true length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from ser_ray.models import voice_file
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import Voice, voices_of
from ser_ray.schema import SAMPLING_RATE, UserError
from ser_ray.serving.limits import Refused
from ser_ray.speech.order import by_length
from ser_ray.training.enrolment import probabilities
from ser_ray.training.inference import pooled_windows

BATCH_SECONDS: Final = 120
"""Padded seconds of a batch, as in training: on two cores a small model answers them in about a second, and a GPU has
the memory for them beside four models."""


@dataclass(frozen=True)
class Job:
    """Windows of one request, at most `BATCH_SECONDS` when padded."""

    model: str
    windows: tuple[np.ndarray, ...]
    """(T,) int16 each."""
    voice: dict[str, Any] | None = None
    """What the client sent of the speaker."""
    embedding: bool = False


@dataclass(frozen=True)
class Known:
    """A job with its model, and what is known of the speaker."""

    job: Job
    model: EmotionClassifier
    voice: Voice | None
    said: str


@dataclass(frozen=True)
class Reply:
    """To a job."""

    probabilities: list[list[float]]
    """For each window, and each emotion of the model; none for a window for which they are not finite."""
    pooled_NP: np.ndarray | None
    """The pooled vectors, if they were asked for."""
    said: str = ""
    """Of which recordings the voice was made."""
    least: float | None = None
    """The probability from which an emotion is in a set, for a model that has sets."""


def jobs_of(
    model: str, windows: Sequence[np.ndarray], voice: dict[str, Any] | None = None, embedding: bool = False
) -> Iterator[tuple[np.ndarray, Job]]:
    """The windows as jobs, those of like length together; with each the places of its windows."""
    for places in by_length(np.array([len(window) for window in windows]), BATCH_SECONDS):
        yield places, Job(model, tuple(windows[place] for place in places), voice, embedding)


def padded_seconds(known: Sequence[Known]) -> int:
    """What a batch of these jobs costs: for each of their models, its longest window times their number."""
    lengths: dict[int, list[int]] = {}
    for one in known:
        lengths.setdefault(id(one.model), []).extend(len(window) for window in one.job.windows)
    return sum(math.ceil(max(own) * len(own) / SAMPLING_RATE) for own in lengths.values() if own)


def known_of(job: Job, model: EmotionClassifier) -> Known:
    """A job for this model. Raises Refused (422) for a voice that is not one of this model."""
    if job.voice is None:
        return Known(job, model, None, "")
    try:
        voice_file.check_uses_voices(model, "voice")
        saved = voice_file.parse(job.voice, model, "voice")
    except UserError as error:
        raise Refused(422, str(error)) from None
    return Known(job, model, saved.voices[0], str(saved))


def answer(known: Sequence[Known]) -> list[Reply]:
    """A reply to each job, in order."""
    replies: dict[int, Reply] = {}
    for model in {id(one.model): one.model for one in known}.values():
        numbers = [number for number, one in enumerate(known) if one.model is model]
        replies |= zip(numbers, _of_model(model, [known[number] for number in numbers]), strict=True)
    return [replies[number] for number in range(len(known))]


def enrolled(model: EmotionClassifier, windows: Sequence[np.ndarray], name: str) -> dict[str, Any]:
    """The voice of the one speaker of all windows, as the content of a voice file. Raises Refused (422) where the model
    does not use voices, or no window can be used."""
    try:
        voice_file.check_uses_voices(model, "voices")
    except UserError as error:
        raise Refused(422, str(error)) from None
    pooled_NP = torch.from_numpy(pooled_windows(model, windows))
    usable = np.flatnonzero(pooled_NP.isfinite().all(-1).numpy())
    if not len(usable):
        raise Refused(422, "no recording could be used")
    return voice_file.content_of(voice_file.saved(model, voices_of(pooled_NP, [usable]), name))


# -- below: how it is done


def _of_model(model: EmotionClassifier, known: Sequence[Known]) -> list[Reply]:
    windows = [window for one in known for window in one.job.windows]
    owners = [one for one in known for _ in one.job.windows]
    pooled_NP = pooled_windows(model, windows)

    def voices_at(rows: Sequence[int]) -> Voice:
        return _voices([owners[row].voice for row in rows], pooled_NP.shape[1])

    found_NK = probabilities(model, torch.from_numpy(pooled_NP), voices_at)
    replies, begin = [], 0
    for one in known:
        own = slice(begin, begin := begin + len(one.job.windows))
        values = [row_K.tolist() if np.isfinite(row_K).all() else [] for row_K in found_NK[own]]
        vectors = pooled_NP[own] if one.job.embedding else None
        replies.append(Reply(values, vectors, one.said, getattr(model, "least_probability", None)))
    return replies


def _voices(given: Sequence[Voice | None], width: int) -> Voice:
    """One for each window; of an unknown speaker k is 0."""
    nothing = Voice(torch.zeros(1).double(), torch.zeros(1, width).double(), torch.zeros(1, width).double())
    return Voice(*(torch.cat(parts) for parts in zip(*(voice or nothing for voice in given), strict=True)))
