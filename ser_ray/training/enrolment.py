"""Answers with recordings of a speaker known: pooled vectors are computed once, and the rest is arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.ensemble import Model, members_of, together
from ser_ray.models.voice import Others, Voice, voices_of
from ser_ray.training.inference import Answer, Piece, Source, answer_of, pooled_pieces, with_whole

CHUNK: Final = 1024
"""Utterances that are answered together: their voices take 16 bytes a feature, 240 MB at 15 000 features."""


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


def enrol(model: Model, sources: Sequence[Source]) -> tuple[Voice | tuple[Voice, ...], list[Piece]]:
    """The voice of the one speaker of all recordings, for an ensemble one for each member, and the pieces that could
    not be used, with reasons.

    A recording that is longer than ``audio.max_seconds`` counts once for each of its windows.
    """
    each = [pooled_pieces(member, sources) for member in members_of(model)]
    pieces = each[0][0]
    usable_N = np.all([pooled_NP.isfinite().all(-1).numpy() for _, pooled_NP in each], axis=0)
    voices = tuple(voices_of(pooled_NP, [np.flatnonzero(usable_N)]) for _, pooled_NP in each)
    unusable = [piece for piece, usable in zip(pieces, usable_N, strict=True) if not usable]
    return voices[0] if len(voices) == 1 else voices, unusable


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
