"""Answers with recordings of a speaker known: pooled vectors are computed once, and the rest is arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.ensemble import Model, members_of, together
from ser_ray.models.voice import Others, SpeakerNorm, Voice, voices_of
from ser_ray.speech.pieces import Piece, Source
from ser_ray.training.inference import Answer, answer_of, pooled_pieces, with_whole

CHUNK: Final = 1024
"""Utterances that are answered together: their voices take 16 bytes a feature, 240 MB at 15 000 features."""
FAR: Final = 3.0
"""`SpeakerNorm.distance` of a recording to the voice of the same speaker: one in a hundred is above it, and half of
another person's are (results/LOG.md, 2026-11-30)."""
FAR_TOGETHER: Final = 2.0
"""The same of the mean over `SEVERAL` recordings or more, whose spread is smaller."""
SEVERAL: Final = 4


class Known(NamedTuple):
    """A speaker as of recordings."""

    voice: Voice | tuple[Voice, ...]
    unusable: list[Piece]
    far: list[tuple[Piece, float]]
    """Recordings that may be another person's, and their distances to the voice of the others."""


@torch.inference_mode()
def probabilities(
    model: EmotionClassifier, pooled_NP: torch.Tensor, voices_at: Callable[[Sequence[int]], Voice]
) -> np.ndarray:
    """(N, K) float64 of utterances with these pooled vectors; ``voices_at``: rows -> what is known of their
    speakers."""
    model.eval()
    device = next(model.head.parameters()).device
    parts = [np.empty((0, len(model.experiment.emotions)))]
    for start in range(0, len(pooled_NP), CHUNK):
        rows = range(start, min(start + CHUNK, len(pooled_NP)))
        relative_BP = model.head.relative(pooled_NP[start : rows.stop].to(device), voices_at(rows))
        parts.append(model.probabilities(model.head.classify(relative_BP)).cpu().numpy())
    return np.concatenate(parts)


def enrol(model: Model, sources: Sequence[Source]) -> Known:
    """The voice of the one speaker of all recordings, for an ensemble one for each member; a head of the model uses
    voices.

    A recording that is longer than ``audio.max_seconds`` counts once for each of its windows.
    """
    each = [pooled_pieces(member, sources) for member in members_of(model)]
    pieces = each[0][0]
    usable_N = np.all([pooled_NP.isfinite().all(-1).numpy() for _, pooled_NP in each], axis=0)
    rows = np.flatnonzero(usable_N)
    voices = tuple(voices_of(pooled_NP, [rows]) for _, pooled_NP in each)
    unusable = [piece for piece, usable in zip(pieces, usable_N, strict=True) if not usable]
    number = _uses_voices(model)
    far = _far(members_of(model)[number], each[number][1][rows], [pieces[row] for row in rows])
    return Known(voices[0] if len(voices) == 1 else voices, unusable, far)


def _uses_voices(model: Model) -> int:
    """The number of the first member whose head uses voices: that by which a recording may be doubted."""
    return next(n for n, member in enumerate(members_of(model)) if member.head.speaker is not None)


def _far(model: EmotionClassifier, pooled_NP: torch.Tensor, pieces: Sequence[Piece]) -> list[tuple[Piece, float]]:
    """Those that are far from all others together."""
    others = Others(pooled_NP, ["enrolled/one"] * len(pieces), [str(piece.source) for piece in pieces])
    assert model.head.speaker is not None
    found = model.head.speaker.distance(pooled_NP, others.at(range(len(pieces)))).tolist() if pieces else []
    return [(piece, distance) for piece, distance in zip(pieces, found, strict=True) if distance > FAR]


def listening(model: Model) -> list[float]:
    """Filled with the distance to its voice of every recording that the model answers from now on, where one is known;
    a head of the model uses voices."""
    distances: list[float] = []

    def note(norm: SpeakerNorm, given: tuple[Any, ...], _: torch.Tensor) -> None:
        pooled_BP, voices = given
        if voices is not None:
            distances.extend(norm.distance(pooled_BP, voices).tolist())

    norm = members_of(model)[_uses_voices(model)].head.speaker
    assert norm is not None
    norm.register_forward_hook(note)
    return distances


def doubt(distances: Sequence[float]) -> str:
    """A line if recordings with these distances are probably not of the speaker of the voice; else empty."""
    finite = [distance for distance in distances if np.isfinite(distance)]
    limit = FAR_TOGETHER if len(finite) >= SEVERAL else FAR
    if not finite or float(np.mean(finite)) <= limit:
        return ""
    return (
        f"distance to the voice {np.mean(finite):.1f}, above {limit:g}: another person, microphone or room? "
        "The answers may be worse than without a voice"
    )


def predict_each_other(model: Model, sources: Sequence[Source], speakers: Sequence[str]) -> Iterator[Answer]:
    """As `inference.predict`, each recording with all others of its speaker known, never itself or a window of itself;
    one pooled vector is held for each. ``speakers``: of each recording, by names as of `ser_ray.schema`."""
    each: list[np.ndarray] = []
    pieces: list[Piece] = []
    for member in members_of(model):
        pieces, pooled_NP = pooled_pieces(member, sources)
        usable = np.flatnonzero(pooled_NP.isfinite().all(-1).numpy())
        own = [pieces[row].source for row in usable]
        others = Others(pooled_NP[usable], [speakers[source] for source in own], list(map(str, own)))
        found_NK = np.full((len(pieces), len(model.experiment.emotions)), np.nan)
        found_NK[usable] = probabilities(member, pooled_NP[usable], others.at)
        each.append(found_NK)
    values_NK, emotions = together(model, each), model.experiment.emotions
    finite_N = np.isfinite(values_NK).all(axis=1)
    values = [row.tolist() if usable else [] for row, usable in zip(values_NK, finite_N, strict=True)]
    yield from with_whole((piece, answer_of(piece, own, emotions)) for piece, own in zip(pieces, values, strict=True))
