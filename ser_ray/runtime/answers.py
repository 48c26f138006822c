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
from ser_ray.models.precision import bound_memory, choose_device
from ser_ray.runtime.scorer import batches_of, probabilities_of
from ser_ray.speech.stream import Batch
from ser_ray.training.cost import Cost, cost_of


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
        each = [probabilities_of(member, rows) for member in ensemble.members_of(model)]
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


# -- below: how it is done


def _alone(rows: pa.Table) -> Iterator[Batch]:
    """Every utterance in a batch of its own."""
    return itertools.chain.from_iterable(batches_of(rows.slice(row, 1), 1.0) for row in range(rows.num_rows))
