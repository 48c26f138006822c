"""A trained model on recordings that are no corpus: files, or samples in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast
from ser_ray.speech import stream
from ser_ray.speech.audio import Unusable, from_samples, load_waveform, to_int16
from ser_ray.training.loop import predict_batches

GROUP: Final = 256
"""Recordings decoded at a time: they are sorted by length, and no others are held in memory."""
SCHEMA: Final = pa.schema(
    {"utterance_id": pa.string(), "num_samples": pa.int32(), "audio": pa.large_binary(), "label": pa.int64()}
)

NOT_FINITE: Final = "what the model predicts for it is not finite"
"""The reason of a recording for which the model's numbers overflow, as in fp16 they may."""

Source = Path | tuple[np.ndarray, int]
"""A file, or samples (T,) and their sampling rate in Hz."""


@dataclass(frozen=True)
class Answer:
    """The result for one recording: probabilities by emotion, or the reason why there are none."""

    path: str
    """Of a file; empty for samples."""
    probabilities: dict[str, float]
    reason: str = ""

    @property
    def emotion(self) -> str:
        """The most probable emotion; empty if the recording could not be used."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default="")

    def row(self, emotions: Sequence[str]) -> dict[str, str | float | None]:
        """As a row of a table that has `answer_columns`; None where there is nothing."""
        probabilities = [self.probabilities.get(emotion) for emotion in emotions]
        values = (self.path or None, self.emotion or None, *probabilities, self.reason or None)
        return dict(zip(answer_columns(emotions), values, strict=True))


def answer_columns(emotions: Sequence[str]) -> list[str]:
    """The columns of a table with a row for each recording: text, but for the probabilities."""
    return ["path", "emotion", *(PROBABILITY + emotion for emotion in emotions), "reason"]


def predict(model: EmotionClassifier, sources: Sequence[Source]) -> Iterator[Answer]:
    """An answer for every recording, in the order given; decoding in groups bounds the memory."""
    for start in range(0, len(sources), GROUP):
        group = sources[start : start + GROUP]
        table, reasons = _read(model, group)
        probabilities: dict[int, list[float]] = {}
        for batch, logits_BK in predict_batches(model, stream.short_to_long(table, model.experiment.batch_seconds)):
            for number, values_K in zip(map(int, batch.utterance_ids), logits_BK.double().softmax(-1), strict=True):
                if values_K.isfinite().all():
                    probabilities[number] = values_K.tolist()
                else:
                    reasons[number] = NOT_FINITE
        for number, source in enumerate(group):
            known = dict(zip(model.experiment.emotions, probabilities.get(number, []), strict=False))
            yield Answer(str(source) if isinstance(source, Path) else "", known, reasons.get(number, ""))


@torch.inference_mode()
def embed(model: EmotionClassifier, sources: Sequence[Source]) -> np.ndarray:
    """The pooled vector of every recording that the classifier sees: (N, P) float32; NaN for one that is not usable."""
    model.eval()
    device = next(model.head.parameters()).device
    embedding_NP = np.full((len(sources), model.head.embedding_width), np.nan, np.float32)
    for start in range(0, len(sources), GROUP):
        table, _ = _read(model, sources[start : start + GROUP])
        for batch in stream.short_to_long(table, model.experiment.batch_seconds):
            batch = batch.to(device)
            with autocast(model.experiment.precision, device):
                pooled_BP = model.head.embed(*model.hidden_states(batch.inputs, batch.lengths_B))
            rows = [start + int(utterance_id) for utterance_id in batch.utterance_ids]
            embedding_NP[rows] = pooled_BP.float().cpu().numpy()
    return embedding_NP


# -- below: how it is done


def _read(model: EmotionClassifier, group: Sequence[Source]) -> tuple[pa.Table, dict[int, str]]:
    """What is usable, as a table whose ids are positions in the group; and why the others are not."""
    rows, reasons = [], {}
    for number, source in enumerate(group):
        try:
            samples = to_int16(_waveform(source, model))
        except Unusable as error:
            reasons[number] = str(error)
            continue
        rows.append({"utterance_id": str(number), "num_samples": len(samples), "audio": samples.tobytes(), "label": 0})
    return pa.Table.from_pylist(rows, SCHEMA), reasons


def _waveform(source: Source, model: EmotionClassifier) -> np.ndarray:
    if isinstance(source, Path):
        return load_waveform(source, model.experiment.audio)
    return from_samples(*source, model.experiment.audio)
