"""What a teacher answers to the utterances of train, and the loss of a student on it (`config.Distil`).

Batches do not carry the answers: they are found by utterance id, as the voices of speakers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ser_ray.config import Distil, Experiment
from ser_ray.protocols.answers import read_answers
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

        Raises UserError as `read_answers`.
        """
        settings = experiment.distil
        if settings.answers is None:
            return None
        ids, probabilities_NK = read_answers(
            Path(settings.answers), experiment.emotions, corpus_of, "utterances of train"
        )
        labelled = [corpus_of.get(i) not in settings.unlabelled for i in ids]
        row = {utterance_id: number for number, utterance_id in enumerate(ids)}
        label_loss = losses.of(experiment.loss)
        return cls(row, torch.from_numpy(probabilities_NK).float(), torch.tensor(labelled), settings, label_loss)

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
