"""The data types of the project: utterances, folds, predictions, and the names of emotions and splits.

Every other module may import this one; of the project's it imports the errors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

SAMPLING_RATE: Final = 16_000
"""Hz: the rate on which every supported backbone was pre-trained, and the rate of the shards."""

EMOTIONS: Final = (
    "angry",
    "disgust",
    "fear",
    "happy",
    "neutral",
    "sad",
    "surprised",
    "calm",
    "boredom",
)
"""The canonical emotions. The first seven are the project's; the others occur in some corpora."""

SPLITS: Final = ("train", "dev", "test")
TIE: Final = "tie"
"""In place of a perceived emotion: listeners voted, and no emotion got more votes than every other."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one speaker, as a corpus describes it.

    ``utterance_id`` and ``speaker`` begin with the corpus's name (``ravdess/03-01-05-01-01-01-12``,
    ``ravdess/12``), so that both are unique over all corpora of an experiment; a speaker of two corpora has the same
    name in both.
    """

    utterance_id: str
    corpus: str
    speaker: str
    emotion: str
    path: str
    text_id: str | None = None
    intensity: str | None = None
    gender: str | None = None
    language: str | None = None
    split: str | None = None
    """The split that the corpus itself assigns, if any."""
    perceived: str | None = None
    """The emotion that most listeners perceived, or `TIE`; None if none voted."""
    agreement: float | None = None
    """The share of listeners who perceived it."""
    start: float | None = None
    """Seconds into the recording at which the utterance begins, if it is a part of one; ``end``: at which it ends."""
    end: float | None = None

    def __post_init__(self) -> None:
        if self.emotion not in EMOTIONS:
            raise ValueError(f"{self.path}: emotion {self.emotion!r} is not one of {', '.join(EMOTIONS)}")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that is not used, and the reason, human-readable."""

    path: str
    reason: str


@dataclass(frozen=True)
class Fold:
    """The split of every utterance, by id; never stored in shards."""

    splits: Mapping[str, str]
    leaky: bool
    description: str
    common_emotions: bool = False
    """Whether emotions that train or test lack are left out by design."""


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

    def over(self, emotions: tuple[str, ...]) -> Predictions:
        """The predictions restricted to ``emotions``: their probabilities, normalised to sum to 1. All labels must be
        among them."""
        if emotions == self.emotions:
            return self
        columns = [self.emotions.index(emotion) for emotion in emotions]
        kept = np.maximum(self.probabilities[:, columns], np.finfo(np.float64).tiny)
        labels = np.array([columns.index(label) for label in self.labels], dtype=np.int64)
        return replace(self, emotions=emotions, labels=labels, probabilities=kept / kept.sum(axis=1, keepdims=True))

    def __len__(self) -> int:
        return len(self.utterance_ids)
