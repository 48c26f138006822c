"""A trained model on recordings that are no corpus: files, or samples in memory, of any length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.disk import readable
from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.ensemble import Model, members_of, together
from ser_ray.models.voice import Voice
from ser_ray.schema import UserError
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


def threshold_of(model: Model, source: object) -> float:
    """The threshold of a model's sets. Raises UserError for one that has none; ``source`` names it."""
    if model.least_probability is None:
        raise UserError(
            f"{source}: this checkpoint has no threshold for sets (calibration.json); give the best/ of a search, or "
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


def pieces_of(model: Model, sources: Sequence[Source]) -> Iterator[Piece]:
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


def _windows(source: Source, model: Model) -> Iterator[Window]:
    if isinstance(source, Path):
        return load_windows(source, model.experiment.audio)
    return windows_of(from_samples(*source, split(model.experiment.audio)))


def _answered(model: Model, waiting: Iterator[Piece], voice: Known) -> Iterator[tuple[Piece, Answer]]:
    members = members_of(model)
    voices: Sequence[Voice | None] = [voice] if isinstance(voice, Voice) else voice or [None] * len(members)
    while group := list(islice(waiting, GROUP)):
        samples = [piece.samples for piece in group]
        each = [_probabilities(member, samples, own) for member, own in zip(members, voices, strict=True)]
        for piece, values_K in zip(group, together(model, each), strict=True):
            values = values_K.tolist() if np.isfinite(values_K).all() else []
            yield piece, answer_of(piece, values, model.experiment.emotions)


def _probabilities(model: EmotionClassifier, samples: Sequence[np.ndarray | None], voice: Voice | None) -> np.ndarray:
    """(N, K) of the windows; NaN for one that is not there."""
    found_NK = np.full((len(samples), len(model.experiment.emotions)), np.nan)
    batches = stream.short_to_long(_table(samples), model.experiment.batch_seconds)
    for batch, logits_BK in predict_batches(model, batches, voice):
        found_NK[list(map(int, batch.utterance_ids))] = model.probabilities(logits_BK).cpu().numpy()
    return found_NK


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
