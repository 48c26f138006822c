"""The evaluation actor: a model's predictions on a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.config import OTHERS, Experiment
from ser_ray.evaluation import baselines, egemaps
from ser_ray.evaluation.enrolment import Enrolled, answered_with, draws_of
from ser_ray.evaluation.predictions import Predictions
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.precision import bound_memory, choose_device
from ser_ray.models.voice import Others, Voice, voices_of
from ser_ray.protocols.folds import counted_emotions
from ser_ray.protocols.task import Task, write_fold
from ser_ray.runtime.feature_cache import CachedFeatures
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import order, stream
from ser_ray.speech.audio import from_int16
from ser_ray.speech.stream import Batch
from ser_ray.training.cost import cost_of
from ser_ray.training.enrolment import probabilities
from ser_ray.training.loop import predict_batches
from ser_ray.training.memory import with_what_fits
from ser_ray.training.probe import start_from_probe
from ser_ray.training.speakers import pooled_vectors

TIMES: Final = 5
"""How often an utterance is predicted for its time, of which the median counts."""


class Scorer:
    """An evaluation actor: predicts a split with a checkpoint, a linear probe of a frozen backbone, or eGeMAPS."""

    def __init__(self, shard_dirs: Sequence[str], folds: str, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        bound_memory(gpus)
        self.device = choose_device(gpus)
        self.shard_dirs, self.folds = [Path(shard_dir) for shard_dir in shard_dirs], Path(folds)

    def score(self, directory: str, split: str, cached: CachedFeatures | None = None) -> Predictions:
        """A checkpoint's predictions on one split of its own fold, in order of utterance id.

        From the waveforms, or from the ``cached`` features if they are given.
        """
        model = checkpoint.load(directory, self.device)
        task = self._task(model.experiment)
        model.prefix = cached.prefix if cached else None
        return self._predict(model, task, split, cached)

    def enrolled(self, directory: str, split: str) -> list[Enrolled]:
        """A checkpoint's predictions on one split of its own fold, with recordings of each speaker known: an entry for
        each number in `config.Enrolment.recordings`. For a head that uses voices."""
        model = checkpoint.load(directory, self.device)
        task, settings = self._task(model.experiment), model.experiment.protocol.enrolment

        def pooled(batch_seconds: float) -> tuple[list[str], torch.Tensor]:
            return pooled_vectors(model, self._batches(task, split, batch_seconds), lambda value: [value])

        ids, pooled_NP = with_what_fits(pooled, model.experiment.batch_seconds)
        index = task.rows(split).sort_by("utterance_id")
        assert index["utterance_id"].to_pylist() == ids
        speakers, emotions = index["speaker"].to_pylist(), index["emotion"].to_pylist()
        others = Others(pooled_NP, speakers, ids)

        def point(recordings: int | str) -> Enrolled:
            draws, used = [], 0.0
            for draw in draws_of(settings, recordings):
                chosen = answered_with(ids, speakers, emotions, settings, recordings, draw)
                used += float(np.mean([len(own) for own in chosen]))
                everyone = recordings == OTHERS and settings.which == "any"  # at the cost of one subtraction
                voices_at = others.at if everyone else partial(_voices_of, pooled_NP, chosen)
                found_NK = probabilities(model, pooled_NP, voices_at)
                draws.append(_predictions(task, split, dict(zip(ids, found_NK, strict=True))))
            return Enrolled(recordings, tuple(draws), used / len(draws))

        return [point(recordings) for recordings in settings.recordings]

    def cost(self, directory: str) -> dict[str, Any]:
        """What a checkpoint costs at prediction: its parameters, the megabytes that its weights take in memory, the
        milliseconds for an utterance of dev's median duration (``seconds``), alone, on this ``device``."""
        model = checkpoint.load(directory, self.device)
        seconds = float(np.median(self._task(model.experiment).durations("dev")))
        waveform_1T = 0.1 * torch.randn(1, round(seconds * SAMPLING_RATE), generator=torch.Generator().manual_seed(0))
        batch = Batch(("",), waveform_1T, torch.tensor([waveform_1T.shape[1]]), torch.zeros(1, dtype=torch.int64))
        cost = cost_of(model, [batch] * TIMES)
        threads = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
        return {
            "parameters": cost.parameters,
            "megabytes": cost.megabytes,
            "milliseconds": cost.milliseconds,
            "seconds": seconds,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else threads,
        }

    def probe(self, values: dict[str, Any], split: str, cached: CachedFeatures | None = None) -> Predictions:
        """The same by logistic regression on the experiment's frozen backbone, on the layer that is best on dev."""
        experiment = Experiment.model_validate(values)
        model, task = build(experiment, self.device), self._task(experiment)
        model.prefix = cached.prefix if cached else None

        def fit(batch_seconds: float) -> None:
            train, dev = (self._batches(task, part, batch_seconds, cached) for part in ("train", "dev"))
            start_from_probe(model, train, dev, lambda value: [value])

        with_what_fits(fit, experiment.batch_seconds)
        return self._predict(model, task, split, cached)

    def egemaps(self, values: dict[str, Any], split: str) -> Predictions:
        """The same by a linear SVM on eGeMAPS features, which openSMILE computes."""
        task = self._task(Experiment.model_validate(values))
        rows = {part: task.rows(part) for part in ("train", split)}
        features = {part: self._features(own) for part, own in rows.items()}
        probabilities_MK = baselines.linear_svm(
            features["train"],
            rows["train"]["label"].to_numpy(),
            rows["train"]["speaker"].to_pylist(),
            features[split],
            len(task.emotions),
        )
        ids = rows[split]["utterance_id"].to_pylist()
        return _predictions(task, split, dict(zip(ids, probabilities_MK, strict=True)))

    def _task(self, experiment: Experiment) -> Task:
        return Task.read(write_fold(experiment, self.shard_dirs, self.folds))

    def _features(self, rows: pa.Table) -> np.ndarray:
        features: list[np.ndarray] = []
        for table in stream.read_files(rows, "audio"):
            features += egemaps.egemaps([from_int16(scalar.as_buffer()) for scalar in table["audio"]])
        return np.stack(features)

    def _batches(
        self, task: Task, split: str, batch_seconds: float, cached: CachedFeatures | None = None
    ) -> Iterator[Batch]:
        return batches_of(task.rows(split), batch_seconds, cached)

    def _predict(
        self, model: EmotionClassifier, task: Task, split: str, cached: CachedFeatures | None = None
    ) -> Predictions:
        return _predictions(task, split, probabilities_of(model, task.rows(split), cached))


def batches_of(rows: pa.Table, batch_seconds: float, cached: CachedFeatures | None = None) -> Iterator[Batch]:
    """Batches of these rows of an index, for evaluation: of waveforms, or of the ``cached`` features."""
    content = stream.content_of(cached.prefix if cached else None)
    files = stream.Files(rows, content.column, cached.paths[0].parent if cached else None)
    for table, packed in files.read(order.epoch(rows, batch_seconds, None)):
        yield from stream.batches(table, packed, content=content)


def probabilities_of(
    model: EmotionClassifier, rows: pa.Table, cached: CachedFeatures | None = None
) -> dict[str, np.ndarray]:
    """Utterance id -> a model's probabilities, (K,) float64, for these rows of an index."""

    def predict(batch_seconds: float) -> dict[str, np.ndarray]:
        probabilities: dict[str, np.ndarray] = {}
        for batch, logits_BK in predict_batches(model, batches_of(rows, batch_seconds, cached)):
            found_BK = model.probabilities(logits_BK).cpu().numpy()
            probabilities.update(zip(batch.utterance_ids, found_BK, strict=True))
        return probabilities

    return with_what_fits(predict, model.experiment.batch_seconds)


# -- below: how it is done


def _voices_of(pooled_NP: torch.Tensor, chosen: Sequence[np.ndarray], rows: Sequence[int]) -> Voice:
    return voices_of(pooled_NP, [chosen[row] for row in rows])


def _predictions(task: Task, split: str, probabilities: dict[str, np.ndarray]) -> Predictions:
    rows = task.rows(split).sort_by("utterance_id")
    ids = rows["utterance_id"].to_pylist()
    assert len(ids) == len(probabilities), (len(ids), len(probabilities))
    predictions = Predictions(
        task.emotions,
        tuple(ids),
        tuple(rows["corpus"].to_pylist()),
        tuple(rows["speaker"].to_pylist()),
        rows["label"].to_numpy(),
        np.stack([probabilities[i] for i in ids]),
    )
    return predictions.over(counted_emotions(task.index, task.emotions, task.fold))
