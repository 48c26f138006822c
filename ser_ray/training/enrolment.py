"""A trained model's answers with recordings of each speaker known: pooled vectors are computed once, and the rest is
arithmetic on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import Voice

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
    parts = []
    for start in range(0, len(pooled_NP), CHUNK):
        rows = range(start, min(start + CHUNK, len(pooled_NP)))
        relative_BP = model.head.relative(pooled_NP[start : rows.stop].to(device), voices_at(rows))
        parts.append(model.head.classify(relative_BP).double().softmax(-1).cpu().numpy())
    return np.concatenate(parts)
