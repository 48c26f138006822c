"""Answers with recordings of a speaker known: pooled vectors are computed once, and the rest is arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
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


def enrol(model: EmotionClassifier, sources: Sequence[Source]) -> tuple[Voice, list[Piece]]:
    """The voice of the one speaker of all recordings, and the pieces that could not be used, with reasons.

    A recording that is longer than ``audio.max_seconds`` counts once for each of its windows.
    """
    pieces, pooled_NP = pooled_pieces(model, sources)
    usable_N = pooled_NP.isfinite().all(-1).numpy()
    voice = voices_of(pooled_NP, [np.flatnonzero(usable_N)])
    return voice, [piece for piece, usable in zip(pieces, usable_N, strict=True) if not usable]


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
