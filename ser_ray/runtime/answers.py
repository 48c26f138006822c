"""The actor behind ``ser-ray distil``: what a teacher answers to any utterances, and what a model costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from ser_ray.evaluation.ensemble import total
from ser_ray.models import ensemble
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import bound_memory, choose_device
from ser_ray.speech import order, stream
from ser_ray.speech.stream import Batch
from ser_ray.training.cost import Cost, cost_of
from ser_ray.training.loop import predict_batches
from ser_ray.training.memory import with_what_fits


class Answerer:
    """Runs checkpoints on rows of an index: ``rows`` has the columns of a fold (`ser_ray.protocols.task.COLUMNS`);
    the values of its column label do not matter."""

    def __init__(self, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        bound_memory(gpus)
        self.threads, self.device = threads, choose_device(gpus)

    def answers(self, directory: str, rows: pa.Table) -> dict[str, np.ndarray]:
        """Utterance id -> the probabilities of a checkpoint or an ensemble, (K,) float64, of the emotions of its
        experiment."""
        model = ensemble.load(directory, self.device)
        each = [self._of_member(member, rows) for member in ensemble.members_of(model)]
        ids = sorted(each[0])
        found_NK = ensemble.together(model, [np.stack([own[i] for i in ids]) for own in each])
        return dict(zip(ids, found_NK, strict=True))

    def cost(self, directory: str, rows: pa.Table) -> Cost:
        """What a checkpoint or an ensemble costs on one core of a CPU, measured on these utterances, one at a time."""
        torch.set_num_threads(1)
        try:
            members = ensemble.members_of(ensemble.load(directory))
            return Cost(**total([asdict(cost_of(member, _alone(rows))) for member in members]))
        finally:
            torch.set_num_threads(self.threads)

    def _of_member(self, model: EmotionClassifier, rows: pa.Table) -> dict[str, np.ndarray]:
        def predict(batch_seconds: float) -> dict[str, np.ndarray]:
            probabilities: dict[str, np.ndarray] = {}
            for batch, logits_BK in predict_batches(model, _batches(rows, batch_seconds)):
                found_BK = model.probabilities(logits_BK).cpu().numpy()
                probabilities.update(zip(batch.utterance_ids, found_BK, strict=True))
            return probabilities

        return with_what_fits(predict, model.experiment.batch_seconds)


# -- below: how it is done


def _alone(rows: pa.Table) -> Iterator[Batch]:
    """Every utterance in a batch of its own."""
    return itertools.chain.from_iterable(_batches(rows.slice(row, 1), 1.0) for row in range(rows.num_rows))


def _batches(rows: pa.Table, batch_seconds: float) -> Iterator[Batch]:
    for table, packed in stream.Files(rows).read(order.epoch(rows, batch_seconds, None)):
        yield from stream.batches(table, packed)
