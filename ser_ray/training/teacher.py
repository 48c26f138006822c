"""What a teacher answers to the utterances of train, and the loss of a student on it (`config.Distil`).

Batches do not carry the answers: they are found by utterance id, as the voices of speakers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ser_ray.config import Distil, Experiment
from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.schema import UserError
from ser_ray.training import losses
from ser_ray.training.losses.distillation import distillation


@dataclass(frozen=True)
class Teacher:
    """A teacher's answers to N utterances, and how a student is trained on them."""

    row: dict[str, int]
    """Utterance id -> its row of the two below."""
    probabilities_NK: torch.Tensor
    labelled_N: torch.Tensor
    """bool: whether the utterance has a label of its own."""
    settings: Distil
    label_loss: losses.Loss

    @classmethod
    def read(cls, experiment: Experiment, corpus_of: dict[str, str]) -> Teacher | None:
        """The teacher of an experiment; None if it has none. ``corpus_of``: utterance id -> corpus, for all of train.

        Raises UserError where its file is missing, is about other emotions, or lacks an utterance.
        """
        settings = experiment.distil
        if settings.answers is None:
            return None
        path, columns = Path(settings.answers), [PROBABILITY + emotion for emotion in experiment.emotions]
        if not path.is_file():
            raise UserError(f"distil.answers: {path} is missing; run ser-ray distil again, which writes it")
        table = pq.read_table(path)
        if table.column_names != ["utterance_id", *columns]:
            raise UserError(f"distil.answers: {path} is about other emotions than {', '.join(experiment.emotions)}")
        ids = table["utterance_id"].to_pylist()
        if missing := sorted(corpus_of.keys() - set(ids)):
            raise UserError(
                f"distil.answers: {path} has no answer to {len(missing)} utterances of train, such as {missing[0]}; "
                "run ser-ray distil again"
            )
        probabilities_NK = np.stack([table[name].to_numpy() for name in columns], axis=1).astype(np.float32)
        labelled = [corpus_of.get(i) not in settings.unlabelled for i in ids]
        row = {utterance_id: number for number, utterance_id in enumerate(ids)}
        label_loss = losses.of(experiment.loss)
        return cls(row, torch.from_numpy(probabilities_NK), torch.tensor(labelled), settings, label_loss)

    def loss(self, utterance_ids: Sequence[str]) -> losses.Loss:
        """The loss of a student on a batch of these utterances, in this order."""
        rows = [self.row[utterance_id] for utterance_id in utterance_ids]
        probabilities_BK, labelled_B = self.probabilities_NK[rows], self.labelled_N[rows]

        def on_both(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
            device = logits_BK.device
            on_teacher_B = distillation(logits_BK, probabilities_BK.to(device), self.settings.temperature)
            weight_B = self.settings.label_weight * labelled_B.to(device)
            return on_teacher_B + weight_B * self.label_loss(logits_BK, labels_B)

        return on_both
