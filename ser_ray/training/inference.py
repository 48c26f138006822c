"""A trained model on recordings that are no corpus: files, or samples in memory, of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import torch

from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.ensemble import Model, members_of, together
from ser_ray.models.voice import Voice
from ser_ray.schema import UserError
from ser_ray.speech import stream
from ser_ray.speech.pieces import Piece, Source, pieces_of
from ser_ray.training.loop import predict_batches
from ser_ray.training.speakers import pooled_batches

GROUP: Final = 64
"""Windows held at a time: they are sorted by length, and answered together. At most 60 MB."""
SCHEMA: Final = pa.schema(
    {"utterance_id": pa.string(), "num_samples": pa.int32(), "audio": pa.large_binary(), "label": pa.int64()}
)

Windows = Sequence[np.ndarray | None]
"""Samples of windows, (T,) int16 each; None for one that is not usable."""

NOT_FINITE: Final = "what the model predicts for it is not finite"
"""The reason of a recording for which the model's numbers overflow, as in fp16 they may."""


@dataclass(frozen=True)
class Answer:
    """The result for one recording, or for one window of it: probabilities by emotion, or the reason why there are
    none."""

    path: str
    """Of a file; empty for samples."""
    probabilities: dict[str, float]
    reason: str = ""
    start: float | None = None
    """Seconds into the recording at which the window begins, and ``end``: at which it ends; None for all of it."""
    end: float | None = None

    @property
    def emotion(self) -> str:
        """The most probable emotion; empty if the recording could not be used."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default="")

    def emotions_from(self, least: float) -> list[str]:
        """The set of `ser_ray.evaluation.sets`, the most probable emotion first; empty without probabilities."""
        ranked = sorted(self.probabilities, key=self.probabilities.__getitem__, reverse=True)
        return [e for place, e in enumerate(ranked) if place == 0 or self.probabilities[e] >= least]

    def row(self, emotions: Sequence[str], least: float | None = None) -> dict[str, Any]:
        """As a row of a table that has `answer_columns`; None where there is nothing. ``least``: the threshold of its
        set, where there is one."""
        probabilities = [self.probabilities.get(emotion) for emotion in emotions]
        sets = [] if least is None else [self.emotions_from(least) or None]
        first = (self.path or None, self.start, self.end, self.emotion or None)
        values = (*first, *sets, *probabilities, self.reason or None)
        return dict(zip(answer_columns(emotions, bool(sets)), values, strict=True))


def answer_columns(emotions: Sequence[str], sets: bool = False) -> list[str]:
    """The columns of a table with a row for each recording and window: text, but for times, probabilities and, with
    ``sets``, the list of emotions in one."""
    first = ["path", "start", "end", "emotion", *(["set"] if sets else [])]
    return [*first, *(PROBABILITY + emotion for emotion in emotions), "reason"]


class HasSets(Protocol):
    """A model, or an export of one."""

    @property
    def least_probability(self) -> float | None:
        """Of an emotion in a set; None if it was not fitted."""


def threshold_of(model: HasSets, source: object) -> float:
    """The threshold of a model's sets. Raises UserError for one that has none; ``source`` names it."""
    if model.least_probability is None:
        raise UserError(
            f"{source}: it has no threshold for sets (calibration.json); give the best/ of a search, or "
            "make it again with ser-ray evaluate RESULTS_DIR"
        )
    return model.least_probability


Known = Voice | Sequence[Voice] | None
"""What is known of the one speaker of all recordings: a voice, for an ensemble one for each member, or nothing."""


def predict(model: Model, sources: Sequence[Source], voice: Known = None) -> Iterator[Answer]:
    """An answer for every recording, in the order given; memory is bounded, whatever their number and length.

    A recording that is longer than ``audio.max_seconds`` of the model's experiment is cut into equal windows, as
    ``audio.too_long: split`` cuts the training data. Each has an answer with its times; that for the whole follows,
    and is their mean.

    ``voice``: what is known of the one speaker of all recordings (`ser_ray.training.enrolment.enrol`).
    """

    members = members_of(model)
    voices: Sequence[Voice | None] = [voice] if isinstance(voice, Voice) else voice or [None] * len(members)

    def run(windows: Windows) -> np.ndarray:
        each = [_probabilities(member, windows, own) for member, own in zip(members, voices, strict=True)]
        return together(model, each)

    experiment = model.experiment
    yield from with_whole(answered(pieces_of(experiment.audio, sources), experiment.emotions, run))


def with_whole(answered: Iterable[tuple[Piece, Answer]]) -> Iterator[Answer]:
    """The answers for all pieces, with that for the whole of each recording that has several."""
    windows: list[Answer] = []
    for piece, answer in answered:
        if piece.of == 1 and not windows:
            yield Answer(answer.path, answer.probabilities, answer.reason)
            continue
        windows.append(answer)
        if answer.start is not None:
            yield answer
        if piece.number == piece.of:
            yield _whole(windows)
            windows = []


def embed(model: Model, sources: Sequence[Source]) -> np.ndarray:
    """The pooled vector of every recording, which the classifier sees, before what is known of its speaker is
    subtracted: (N, P) float32; NaN for one that is not usable. Those of an ensemble's members stand side by side.

    That of a recording longer than ``audio.max_seconds`` is the mean over the windows that `predict` cuts it into;
    those that are silent do not count, as there.
    """
    if len(members := members_of(model)) > 1:
        return np.concatenate([embed(member, sources) for member in members], axis=1)
    pieces, pooled_NP = pooled_pieces(members[0], sources)
    windows: list[list[np.ndarray]] = [[] for _ in sources]
    for piece, vector_P in zip(pieces, pooled_NP.numpy(), strict=True):
        if piece.reason and piece.start is None:  # it could not be read to its end
            windows[piece.source].clear()
        windows[piece.source].append(vector_P)
    return np.stack([mean_of_finite(own) for own in windows]) if windows else pooled_NP.numpy()


def pooled_pieces(model: EmotionClassifier, sources: Sequence[Source]) -> tuple[list[Piece], torch.Tensor]:
    """Every piece of the recordings, without its samples, and pooled_NP, NaN for one that is not usable."""
    waiting, pieces = pieces_of(model.experiment.audio, sources), []
    vectors = [np.empty((0, model.head.embedding_width), np.float32)]
    while group := list(islice(waiting, GROUP)):
        vectors.append(pooled_windows(model, [piece.samples for piece in group]))
        pieces += [replace(piece, samples=None) for piece in group]
    return pieces, torch.from_numpy(np.concatenate(vectors))


def pooled_windows(model: EmotionClassifier, windows: Windows) -> np.ndarray:
    """The pooled vector of every window, (T,) int16 each: (N, P) float32, NaN for one that is None."""
    vectors_NP = np.full((len(windows), model.head.embedding_width), np.nan, np.float32)
    batches = stream.short_to_long(_table(windows), model.experiment.batch_seconds)
    for numbers, pooled_BP in pooled_batches(model, batches):
        vectors_NP[list(map(int, numbers))] = pooled_BP
    return vectors_NP


def mean_of_finite(windows: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of the vectors that are finite; if none is, one of NaN."""
    finite = [vector_P for vector_P in windows if np.isfinite(vector_P).all()]
    return np.mean(finite, axis=0) if finite else np.full_like(windows[0], np.nan)


def answered(
    waiting: Iterator[Piece], emotions: Sequence[str], run: Callable[[Windows], np.ndarray]
) -> Iterator[tuple[Piece, Answer]]:
    """The answer for every piece, in the order given. ``run``: at most `GROUP` windows -> their probabilities (N, K),
    NaN for one that is None."""
    while group := list(islice(waiting, GROUP)):
        for piece, values_K in zip(group, run([piece.samples for piece in group]), strict=True):
            values = values_K.tolist() if np.isfinite(values_K).all() else []
            yield piece, answer_of(piece, values, emotions)


def by_batch(
    windows: Windows, emotions: int, batch_seconds: float, run: Callable[[stream.Batch], np.ndarray]
) -> np.ndarray:
    """The probabilities of windows (N, K), NaN for one that is None. ``run``: a batch of at most ``batch_seconds``
    padded seconds -> its probabilities (B, K)."""
    found_NK = np.full((len(windows), emotions), np.nan)
    for batch in stream.short_to_long(_table(windows), batch_seconds):
        found_NK[list(map(int, batch.utterance_ids))] = run(batch)
    return found_NK


def answer_of(piece: Piece, values: Sequence[float], emotions: Sequence[str]) -> Answer:
    """The answer for a piece; ``values``: a probability for each emotion, none where they are not finite."""
    reason = piece.reason or ("" if values else NOT_FINITE)
    return Answer(piece.path, dict(zip(emotions, values, strict=False)), reason, piece.start, piece.end)


# -- below: how it is done


def _probabilities(model: EmotionClassifier, windows: Windows, voice: Voice | None) -> np.ndarray:

    def run(batch: stream.Batch) -> np.ndarray:
        ((_, logits_BK),) = predict_batches(model, [batch], voice)
        return model.probabilities(logits_BK).cpu().numpy()

    return by_batch(windows, len(model.experiment.emotions), model.experiment.batch_seconds, run)


def _whole(windows: Sequence[Answer]) -> Answer:
    """The answer for all of a recording, from those for its windows, which are of equal length."""
    usable = [answer.probabilities for answer in windows if answer.probabilities]
    if windows[-1].start is None or not usable:  # it could not be read to its end
        return Answer(windows[0].path, {}, windows[-1].reason)
    return Answer(windows[0].path, {e: sum(each[e] for each in usable) / len(usable) for e in usable[0]})


def _table(samples: Windows) -> pa.Table:
    """Those that are there, with their places as ids."""
    rows = [
        {"utterance_id": str(number), "num_samples": len(array), "audio": array.tobytes(), "label": 0}
        for number, array in enumerate(samples)
        if array is not None
    ]
    return pa.Table.from_pylist(rows, SCHEMA)
