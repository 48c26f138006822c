"""A trained model on recordings that are no corpus: files, or samples in memory, of any length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.disk import readable
from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import Voice
from ser_ray.speech import stream
from ser_ray.speech.audio import Unusable, from_samples, is_silent, to_int16
from ser_ray.speech.long import Window, load_windows, split, windows_of
from ser_ray.training.loop import predict_batches
from ser_ray.training.speakers import pooled_batches

GROUP: Final = 64
"""Windows held at a time: they are sorted by length, and answered together. At most 60 MB."""
SCHEMA: Final = pa.schema(
    {"utterance_id": pa.string(), "num_samples": pa.int32(), "audio": pa.large_binary(), "label": pa.int64()}
)

NOT_FINITE: Final = "what the model predicts for it is not finite"
"""The reason of a recording for which the model's numbers overflow, as in fp16 they may."""

Source = Path | tuple[np.ndarray, int]
"""A file, or samples (T,) and their sampling rate in Hz."""


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
    yield from with_whole(_answered(model, pieces_of(model, sources), voice))


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
    return np.stack([_mean(own) for own in windows]) if windows else pooled_NP.numpy()


def pooled_pieces(model: EmotionClassifier, sources: Sequence[Source]) -> tuple[list[Piece], torch.Tensor]:
    """Every piece of the recordings, without its samples, and pooled_NP, NaN for one that is not usable."""
    waiting, pieces = pieces_of(model, sources), []
    vectors = [np.empty((0, model.head.embedding_width), np.float32)]
    while group := list(islice(waiting, GROUP)):
        vectors_BP = np.full((len(group), model.head.embedding_width), np.nan, np.float32)
        batches = stream.short_to_long(_table([piece.samples for piece in group]), model.experiment.batch_seconds)
        for numbers, pooled_BP in pooled_batches(model, batches):
            vectors_BP[list(map(int, numbers))] = pooled_BP
        vectors.append(vectors_BP)
        pieces += [replace(piece, samples=None) for piece in group]
    return pieces, torch.from_numpy(np.concatenate(vectors))


def answer_of(piece: Piece, values: Sequence[float], emotions: Sequence[str]) -> Answer:
    """The answer for a piece; ``values``: a probability for each emotion, none where they are not finite."""
    reason = piece.reason or ("" if values else NOT_FINITE)
    return Answer(piece.path, dict(zip(emotions, values, strict=False)), reason, piece.start, piece.end)


@dataclass(frozen=True)
class Piece:
    """A window that waits for its answer, or the reason why there is none."""

    path: str
    samples: np.ndarray | None
    """(T,) int16."""
    reason: str = ""
    start: float | None = None
    end: float | None = None
    number: int = 1
    of: int = 1
    source: int = 0
    """The number of its recording among all, from 0."""


def pieces_of(model: EmotionClassifier, sources: Sequence[Source]) -> Iterator[Piece]:
    """The windows of all recordings; whatever is wrong with one recording, the others follow."""
    for place, source in enumerate(sources):
        path = readable(source) if isinstance(source, Path) else ""
        try:
            for window in _windows(source, model):
                times = (window.start, window.end, window.number, window.of, place)
                if window.of > 1 and is_silent(window.waveform):
                    yield Piece(path, None, "silent: the window's peak is below -60 dBFS", *times)
                else:
                    yield Piece(path, to_int16(window.waveform), "", *times)
        except Unusable as error:
            yield Piece(path, None, str(error), source=place)
        except OSError as error:
            where = f"{error.filename}: " if error.filename and error.filename != str(source) else ""
            reason = f"cannot be read: {where}{os.strerror(error.errno or 0)}"
            yield Piece(path, None, reason, source=place)


# -- below: how it is done


def _windows(source: Source, model: EmotionClassifier) -> Iterator[Window]:
    if isinstance(source, Path):
        return load_windows(source, model.experiment.audio)
    return windows_of(from_samples(*source, split(model.experiment.audio)))


def _answered(
    model: EmotionClassifier, waiting: Iterator[Piece], voice: Voice | None
) -> Iterator[tuple[Piece, Answer]]:
    while group := list(islice(waiting, GROUP)):
        probabilities: dict[int, list[float]] = {}
        batches = stream.short_to_long(_table([piece.samples for piece in group]), model.experiment.batch_seconds)
        for batch, logits_BK in predict_batches(model, batches, voice):
            for number, values_K in zip(map(int, batch.utterance_ids), model.probabilities(logits_BK), strict=True):
                probabilities[number] = values_K.tolist() if values_K.isfinite().all() else []
        for number, piece in enumerate(group):
            yield piece, answer_of(piece, probabilities.get(number, []), model.experiment.emotions)


def _mean(windows: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of the vectors that are finite; if none is, one of NaN."""
    finite = [vector_P for vector_P in windows if np.isfinite(vector_P).all()]
    return np.mean(finite, axis=0) if finite else np.full_like(windows[0], np.nan)


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
