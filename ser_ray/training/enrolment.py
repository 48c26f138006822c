"""Answers with recordings of a speaker known: pooled vectors are computed once, and the rest is arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import Others, SpeakerNorm, Voice, voices_of
from ser_ray.training.inference import Answer, Piece, Source, answer_of, pooled_pieces, with_whole

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

    voice: Voice
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
        parts.append(model.head.classify(relative_BP).double().softmax(-1).cpu().numpy())
    return np.concatenate(parts)


def enrol(model: EmotionClassifier, sources: Sequence[Source]) -> Known:
    """The voice of the one speaker of all recordings; the model's head uses voices.

    A recording that is longer than ``audio.max_seconds`` counts once for each of its windows.
    """
    pieces, pooled_NP = pooled_pieces(model, sources)
    usable_N = pooled_NP.isfinite().all(-1).numpy()
    rows = np.flatnonzero(usable_N)
    unusable = [piece for piece, usable in zip(pieces, usable_N, strict=True) if not usable]
    return Known(voices_of(pooled_NP, [rows]), unusable, _far(model, pooled_NP[rows], [pieces[row] for row in rows]))


def _far(model: EmotionClassifier, pooled_NP: torch.Tensor, pieces: Sequence[Piece]) -> list[tuple[Piece, float]]:
    """Those that are far from all others together."""
    others = Others(pooled_NP, ["enrolled/one"] * len(pieces), [str(piece.source) for piece in pieces])
    assert model.head.speaker is not None
    found = model.head.speaker.distance(pooled_NP, others.at(range(len(pieces)))).tolist() if pieces else []
    return [(piece, distance) for piece, distance in zip(pieces, found, strict=True) if distance > FAR]


def listening(model: EmotionClassifier) -> list[float]:
    """Filled with the distance to its voice of every recording that the model answers from now on, where one is known;
    the model's head uses voices."""
    distances: list[float] = []

    def note(norm: SpeakerNorm, given: tuple[Any, ...], _: torch.Tensor) -> None:
        pooled_BP, voices = given
        if voices is not None:
            distances.extend(norm.distance(pooled_BP, voices).tolist())

    assert model.head.speaker is not None
    model.head.speaker.register_forward_hook(note)
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


def predict_each_other(
    model: EmotionClassifier, sources: Sequence[Source], speakers: Sequence[str]
) -> Iterator[Answer]:
    """As `inference.predict`, each recording with all others of its speaker known, never itself or a window of itself;
    one pooled vector is held for each. ``speakers``: of each recording, by names as of `ser_ray.schema`."""
    pieces, pooled_NP = pooled_pieces(model, sources)
    usable = np.flatnonzero(pooled_NP.isfinite().all(-1).numpy())
    own = [pieces[row].source for row in usable]
    others = Others(pooled_NP[usable], [speakers[source] for source in own], list(map(str, own)))
    found_NK = probabilities(model, pooled_NP[usable], others.at)
    values = {int(row): found_K.tolist() for row, found_K in zip(usable, found_NK, strict=True)}
    emotions = model.experiment.emotions
    yield from with_whole((piece, answer_of(piece, values.get(n, []), emotions)) for n, piece in enumerate(pieces))
