"""An experiment's utterances by split: what the shards hold, under its emotions and its protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.config import Experiment
from ser_ray.protocols.folds import labelled, make_fold
from ser_ray.schema import Fold
from ser_ray.speech import shards


@dataclass(frozen=True)
class Task:
    """``index`` has a row for every utterance of the fold (all columns of the shards but the audio, and ``label``)."""

    emotions: tuple[str, ...]
    index: pa.Table
    fold: Fold

    def labels(self, split: str) -> dict[str, int]:
        """Utterance id -> label, for one split."""
        ids, labels = self.index["utterance_id"].to_pylist(), self.index["label"].to_pylist()
        return {i: label for i, label in zip(ids, labels, strict=True) if self.fold.splits[i] == split}

    def counts(self, split: str) -> tuple[int, ...]:
        """Utterances of every emotion in one split."""
        labels = list(self.labels(split).values())
        return tuple(labels.count(label) for label in range(len(self.emotions)))

    def durations(self, split: str) -> list[float]:
        """Seconds of every utterance in one split."""
        ids, seconds = self.index["utterance_id"].to_pylist(), self.index["duration"].to_pylist()
        return [s for i, s in zip(ids, seconds, strict=True) if self.fold.splits[i] == split]


def load_task(experiment: Experiment, shard_dirs: Sequence[Path]) -> Task:
    """Read the shards' index and split it; the same on every process.

    Raises UserError where the protocol does not fit the speakers.
    """
    everything = shards.read_index(list(shard_dirs))
    index = labelled(everything, experiment.emotions, experiment.merge, experiment.label)
    fold = make_fold(index, experiment.protocol)
    used = pc.is_in(index["utterance_id"], value_set=pa.array(list(fold.splits), pa.string()))
    return Task(experiment.emotions, index.filter(used), fold)
