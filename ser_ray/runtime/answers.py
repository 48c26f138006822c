"""The actor behind ``ser-ray distil``: what a teacher answers to any utterances, and what a model costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from ser_ray.models import checkpoint
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
        """Utterance id -> a checkpoint's probabilities, (K,) float64, of the emotions of its experiment."""
        model = checkpoint.load(directory, self.device)
        temperature = getattr(model, "temperature", 1.0)

        def predict(batch_seconds: float) -> dict[str, np.ndarray]:
            probabilities: dict[str, np.ndarray] = {}
            for batch, logits_BK in predict_batches(model, _batches(rows, batch_seconds)):
                found_BK = (logits_BK.double() / temperature).softmax(-1).cpu().numpy()
                probabilities.update(zip(batch.utterance_ids, found_BK, strict=True))
            return probabilities

        return with_what_fits(predict, model.experiment.batch_seconds)

    def cost(self, directory: str, rows: pa.Table) -> Cost:
        """What a checkpoint costs on one core of a CPU, measured on these utterances, one at a time."""
        torch.set_num_threads(1)
        try:
            alone = (_batches(rows.slice(row, 1), 1.0) for row in range(rows.num_rows))
            return cost_of(checkpoint.load(directory), itertools.chain.from_iterable(alone))
        finally:
            torch.set_num_threads(self.threads)


# -- below: how it is done


def _batches(rows: pa.Table, batch_seconds: float) -> Iterator[Batch]:
    for table, packed in stream.Files(rows).read(order.epoch(rows, batch_seconds, None)):
        yield from stream.batches(table, packed)
