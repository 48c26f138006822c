"""What a model predicted for the utterances of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.special import softmax

from ser_ray.schema import is_known

COLUMNS: Final = ("utterance_id", "corpus", "speaker", "split", "emotion", "predicted")
"""Of a table with a row for each utterance of a corpus; the probabilities follow."""
PROBABILITY: Final = "p_"
"""In every table of predictions, the column of an emotion's probability is named this and the emotion."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for N utterances and K emotions; columns of equal length.

    ``labels`` (N,) int64 are indices into ``emotions``; ``probabilities`` (N, K) float64 rows sum to 1.
    """

    emotions: tuple[str, ...]
    utterance_ids: tuple[str, ...]
    corpora: tuple[str, ...]
    speakers: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.utterance_ids)
        assert len(self.corpora) == len(self.speakers) == n, (n, len(self.corpora), len(self.speakers))
        assert self.labels.shape == (n,), self.labels.shape
        assert self.probabilities.shape == (n, len(self.emotions)), self.probabilities.shape

    @property
    def predicted(self) -> np.ndarray:
        """(N,) int64: the most probable label of each utterance."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def named_speakers(self) -> list[str]:
        """The speakers; all who are not known, of one corpus, have one name."""
        return [s if is_known(s) else f"{s.partition('/')[0]}/unknown" for s in self.speakers]

    def columns(self, split: str) -> dict[str, Any]:
        """As the columns of a table with a row for each utterance: those of `COLUMNS`, and the K probabilities."""
        names = np.asarray(self.emotions)
        emotion, predicted = names[self.labels], names[self.predicted]
        text = (self.utterance_ids, self.corpora, self.speakers, [split] * len(self), emotion, predicted)
        probabilities = zip(self.emotions, self.probabilities.T, strict=True)
        return dict(zip(COLUMNS, text, strict=True)) | {PROBABILITY + name: column for name, column in probabilities}

    def over(self, emotions: tuple[str, ...]) -> Predictions:
        """The predictions restricted to ``emotions``: their probabilities, normalised to sum to 1. All labels must be
        among them."""
        if emotions == self.emotions:
            return self
        columns = [self.emotions.index(emotion) for emotion in emotions]
        kept = np.maximum(self.probabilities[:, columns], np.finfo(np.float64).tiny)
        labels = np.array([columns.index(label) for label in self.labels], dtype=np.int64)
        return replace(self, emotions=emotions, labels=labels, probabilities=kept / kept.sum(axis=1, keepdims=True))

    def at_temperature(self, temperature: float) -> Predictions:
        """The predictions of the same model with its logits divided by ``temperature``; the most probable emotion of
        an utterance stays the same."""
        if temperature == 1.0:
            return self
        # The logarithm of a probability is its logit, up to a number that is the same for all emotions.
        scaled = np.log(np.maximum(self.probabilities, np.finfo(np.float64).tiny)) / temperature
        return replace(self, probabilities=softmax(scaled, axis=1))

    def at(self, rows: Sequence[int]) -> Predictions:
        """Those of the utterances at ``rows``, in that order."""
        order = list(rows)
        return Predictions(
            self.emotions,
            tuple(self.utterance_ids[row] for row in order),
            tuple(self.corpora[row] for row in order),
            tuple(self.speakers[row] for row in order),
            self.labels[order],
            self.probabilities[order],
        )

    def __len__(self) -> int:
        return len(self.utterance_ids)


def pooled(parts: Sequence[Predictions]) -> Predictions:
    """All parts one after the other; an utterance of several parts counts once for each."""

    def joined(name: str) -> tuple[str, ...]:
        return tuple(value for part in parts for value in getattr(part, name))

    return Predictions(
        parts[0].emotions,
        joined("utterance_ids"),
        joined("corpora"),
        joined("speakers"),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
    )
