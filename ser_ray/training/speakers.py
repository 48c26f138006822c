"""What the head knows of the speakers of train while it is trained (`config.Head.speaker`).

An utterance is answered with ``k`` other recordings of its speaker, never itself, drawn anew each epoch. ``k`` is one
of `COUNTS`, each equally likely, since what recordings add to a speaker's mean falls with their number: so one model
serves every number, and knows 0. The draw depends on the seed, the epoch and the utterance alone: not on batches,
processes or the names of speakers. Speakers who are not known count as k = 0.

The pooled vectors that voices are made of come from a pass over train without gradient or augmentation, before the
first epoch and after each: it takes as long as the forward passes of an epoch. They are constants for the gradient,
and at the end of an epoch they are those of the weights at its beginning. The average speaker, which is saved with the
head, is always that of the current weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast
from ser_ray.models.voice import Voice, rows_by, voices_of
from ser_ray.schema import is_known
from ser_ray.speech.stream import Batch

COUNTS: Final = (0, 1, 2, 4, 8, 16, None)
"""Numbers of recordings in training; None: all others. A speaker with fewer others is known by all of them."""


class TrainVoices:
    """The voices of train's utterances, made of the model's own pooled vectors; without `config.Head.speaker` none."""

    def __init__(
        self,
        model: EmotionClassifier,
        train: Callable[[], Iterable[Batch]],
        speakers: Mapping[str, str],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        """``train``: this process's share of train, without augmentation. ``speakers``: utterance id -> speaker."""
        self.model, self.train, self.speakers, self.gather = model, train, speakers, gather
        self.epoch = -1
        self.known: Drawn | None = None

    def update(self, epoch: int) -> None:
        """Compute all pooled vectors with the weights after ``epoch``, and set the head's average speaker."""
        norm = self.model.head.speaker
        if norm is None or self.epoch == epoch:
            return
        ids, pooled_NP = pooled_vectors(self.model, self.train(), self.gather)
        named = [self.speakers[utterance_id] for utterance_id in ids]
        norm.fit(pooled_NP, named)
        self.known, self.epoch = Drawn(pooled_NP, ids, named), epoch

    def drawn(self, utterance_ids: Sequence[str], epoch: int) -> Voice | None:
        """What the model knows of the speakers of a batch in this epoch; None without `config.Head.speaker`."""
        return None if self.known is None else self.known.voices(utterance_ids, self.model.experiment.seed, epoch)


class Drawn:
    """Random recordings of each utterance's speaker, out of the N that have a pooled vector."""

    def __init__(self, pooled_NP: torch.Tensor, utterance_ids: Sequence[str], speakers: Sequence[str]) -> None:
        self.pooled_NP = pooled_NP
        self.row = {utterance_id: row for row, utterance_id in enumerate(utterance_ids)}
        self.speakers, self.rows = speakers, rows_by(speakers)

    def voices(self, utterance_ids: Sequence[str], seed: int, epoch: int) -> Voice:
        """A voice for each of these utterances, which are among the N."""
        return voices_of(self.pooled_NP, [self.recordings(i, seed, epoch) for i in utterance_ids])

    def recordings(self, utterance_id: str, seed: int, epoch: int) -> np.ndarray:
        """The rows that an utterance is answered with in an epoch."""
        row = self.row[utterance_id]
        speaker = self.speakers[row]
        own = self.rows[speaker]
        others = own[own != row] if is_known(speaker) else own[:0]
        digest = hashlib.blake2b(utterance_id.encode(), digest_size=8).digest()
        rng = np.random.default_rng((seed, epoch, int.from_bytes(digest, "big")))
        count = COUNTS[rng.integers(len(COUNTS))]
        wanted = len(others) if count is None else min(count, len(others))
        return np.sort(rng.choice(others, wanted, replace=False))


@torch.inference_mode()
def pooled_batches(model: EmotionClassifier, batches: Iterable[Batch]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The utterance ids of every batch, and its pooled_BP; in evaluation mode and training's precision."""
    model.eval()
    device = next(model.head.parameters()).device
    for batch in batches:
        batch = batch.to(device)
        with autocast(model.experiment.precision, device):
            pooled_BP = model.pooled(batch.inputs, batch.lengths_B, batch.padded)
        yield batch.utterance_ids, pooled_BP.float().cpu().numpy()


def pooled_vectors(
    model: EmotionClassifier, batches: Iterable[Batch], gather: Callable[[Any], list[Any]]
) -> tuple[list[str], torch.Tensor]:
    """Utterance ids, sorted, and pooled_NP on the CPU, over the batches of all processes."""
    own = [pair for ids, pooled_BP in pooled_batches(model, batches) for pair in zip(ids, pooled_BP, strict=True)]
    every = sorted((pair for part in gather(own) for pair in part), key=lambda pair: pair[0])
    ids = [utterance_id for utterance_id, _ in every]
    assert len(set(ids)) == len(ids), "an utterance was run twice"
    return ids, torch.from_numpy(np.stack([pooled_P for _, pooled_P in every]))
