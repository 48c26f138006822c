"""A trained model on recordings that are no corpus: files, or samples in memory, of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import Voice
from ser_ray.speech import stream
from ser_ray.speech.pieces import Piece, Source, pieces_of
from ser_ray.training.loop import predict_batches
from ser_ray.training.speakers import pooled_batches

GROUP: Final = 64
"""Windows held at a time: they are sorted by length, and answered together. At most 60 MB."""
SCHEMA: Final = pa.schema(
    {"utterance_id": pa.string(), "num_samples": pa.int32(), "audio": pa.large_binary(), "label": pa.int64()}
)

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

    def row(self, emotions: Sequence[str]) -> dict[str, str | float | None]:
        """As a row of a table that has `answer_columns`; None where there is nothing."""
        probabilities = [self.probabilities.get(emotion) for emotion in emotions]
        values = (self.path or None, self.start, self.end, self.emotion or None, *probabilities, self.reason or None)
        return dict(zip(answer_columns(emotions), values, strict=True))


def answer_columns(emotions: Sequence[str]) -> list[str]:
    """The columns of a table with a row for each recording and window: text, but for times and probabilities."""
    return ["path", "start", "end", "emotion", *(PROBABILITY + emotion for emotion in emotions), "reason"]


def predict(model: EmotionClassifier, sources: Sequence[Source], voice: Voice | None = None) -> Iterator[Answer]:
    """An answer for every recording, in the order given; memory is bounded, whatever their number and length.

    A recording that is longer than ``audio.max_seconds`` of the model's experiment is cut into equal windows, as
    ``audio.too_long: split`` cuts the training data. Each has an answer with its times; that for the whole follows,
    and is their mean.

    ``voice``: what is known of the one speaker of all recordings (`ser_ray.training.enrolment.enrol`).
    """

    def run(batches: Iterable[stream.Batch]) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
        for batch, logits_BK in predict_batches(model, batches, voice):
            yield batch.utterance_ids, logits_BK.double().softmax(-1)

    experiment = model.experiment
    pieces = pieces_of(experiment.audio, sources)
    yield from with_whole(answered(pieces, experiment.emotions, experiment.batch_seconds, run))


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


def embed(model: EmotionClassifier, sources: Sequence[Source]) -> np.ndarray:
    """The pooled vector of every recording, which the classifier sees, before what is known of its speaker is
    subtracted: (N, P) float32; NaN for one that is not usable.

    That of a recording longer than ``audio.max_seconds`` is the mean over the windows that `predict` cuts it into;
    those that are silent do not count, as there.
    """
    pieces, pooled_NP = pooled_pieces(model, sources)
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


def pooled_windows(model: EmotionClassifier, windows: Sequence[np.ndarray | None]) -> np.ndarray:
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
    waiting: Iterator[Piece],
    emotions: Sequence[str],
    batch_seconds: float,
    run: Callable[[Iterable[stream.Batch]], Iterator[tuple[Sequence[str], torch.Tensor]]],
) -> Iterator[tuple[Piece, Answer]]:
    """The answer for every piece, in the order given. ``run``: batches of at most ``batch_seconds`` padded seconds ->
    the utterance ids of each, and its probabilities (B, K)."""
    while group := list(islice(waiting, GROUP)):
        probabilities: dict[int, list[float]] = {}
        batches = stream.short_to_long(_table([piece.samples for piece in group]), batch_seconds)
        for utterance_ids, found_BK in run(batches):
            for number, values_K in zip(map(int, utterance_ids), found_BK, strict=True):
                probabilities[number] = values_K.tolist() if values_K.isfinite().all() else []
        for number, piece in enumerate(group):
            yield piece, answer_of(piece, probabilities.get(number, []), emotions)


def answer_of(piece: Piece, values: Sequence[float], emotions: Sequence[str]) -> Answer:
    """The answer for a piece; ``values``: a probability for each emotion, none where they are not finite."""
    reason = piece.reason or ("" if values else NOT_FINITE)
    return Answer(piece.path, dict(zip(emotions, values, strict=False)), reason, piece.start, piece.end)


# -- below: how it is done


def _whole(windows: Sequence[Answer]) -> Answer:
    """The answer for all of a recording, from those for its windows, which are of equal length."""
    usable = [answer.probabilities for answer in windows if answer.probabilities]
    if windows[-1].start is None or not usable:  # it could not be read to its end
        return Answer(windows[0].path, {}, windows[-1].reason)
    return Answer(windows[0].path, {e: sum(each[e] for each in usable) / len(usable) for e in usable[0]})


def _table(samples: Sequence[np.ndarray | None]) -> pa.Table:
    """Those that are there, with their places as ids."""
    rows = [
        {"utterance_id": str(number), "num_samples": len(array), "audio": array.tobytes(), "label": 0}
        for number, array in enumerate(samples)
        if array is not None
    ]
    return pa.Table.from_pylist(rows, SCHEMA)
