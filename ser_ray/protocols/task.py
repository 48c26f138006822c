"""An experiment's utterances by split: those of the shards that have its emotions, split by its protocol.

They are computed once and written as one Parquet file, the fold, which every process that trains or scores reads. It
has a row for every utterance, in the order of the shards, with the location of its audio.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.config.validation import hint
from ser_ray.disk import replacing
from ser_ray.protocols import exclusion, unlabelled
from ser_ray.protocols.folds import labelled, make_fold, merged
from ser_ray.schema import Fold, UserError, shortened
from ser_ray.speech import shards
from ser_ray.speech.matching import same_recordings_in

COLUMNS: Final = (
    *("utterance_id", "corpus", "speaker", "emotion", "label", "split", "duration", "num_samples"),
    "shard",  # the file of its audio, dictionary-encoded; the file of its cached features has the same name
    "row",  # in that file
)
"""The columns of a fold's file."""
METADATA: Final = b"ser_ray"


@dataclass(frozen=True)
class Task:
    """``index`` has a row for every utterance of the fold, in the order of the shards. Its columns are `COLUMNS`; in a
    task that was made from the shards also all of their other columns except the audio."""

    emotions: tuple[str, ...]
    index: pa.Table
    description: str
    """Human-readable description of the fold."""
    leaky: bool
    """Whether the protocol shares speakers between splits."""
    common_emotions: bool
    """Whether emotions that train or test lack are left out by design."""
    absent: str = ""
    """A line about emotions of the experiment that no utterance has; empty where there are none."""
    excluded: pa.Table | None = None
    """The utterances that `Experiment.exclude` leaves out, from `exclusion.without`; only in a task that was made from
    the shards."""

    @property
    def unsplit(self) -> pa.Table:
        """The index for making other folds: its column split is the corpus's own. Only for a task that was made from
        the shards."""
        return self.index.drop_columns("split").rename_columns({"own_split": "split"})

    @cached_property
    def fold(self) -> Fold:
        """The split of every utterance by its id."""
        ids, splits = self.index["utterance_id"].to_pylist(), self.index["split"].to_pylist()
        return Fold(dict(zip(ids, splits, strict=True)), self.leaky, self.description, self.common_emotions)

    def rows(self, split: str) -> pa.Table:
        """The utterances of one split."""
        return self.index.filter(pc.equal(self.index["split"], split)).combine_chunks()

    def labels(self, split: str) -> dict[str, int]:
        """Utterance id -> label, for one split."""
        rows = self.rows(split)
        return dict(zip(rows["utterance_id"].to_pylist(), rows["label"].to_pylist(), strict=True))

    def counts(self, split: str) -> tuple[int, ...]:
        """Number of utterances of every emotion in one split."""
        return tuple(np.bincount(self.rows(split)["label"].to_numpy(), minlength=len(self.emotions)).tolist())

    def durations(self, split: str) -> list[float]:
        """Seconds of every utterance in one split."""
        seconds: list[float] = self.rows(split)["duration"].to_pylist()
        return seconds

    def write(self, path: Path) -> None:
        """Write the fold's file."""
        about = {
            "emotions": self.emotions,
            "description": self.description,
            "leaky": self.leaky,
            "common_emotions": self.common_emotions,
        }
        table = self.index.select(COLUMNS).replace_schema_metadata({METADATA: json.dumps(about)})
        with replacing(path) as aside:
            pq.write_table(table, aside, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> Task:
        """Read what `write` wrote."""
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[METADATA])
        return cls(tuple(about["emotions"]), table, about["description"], about["leaky"], about["common_emotions"])


def load_task(experiment: Experiment, shard_dirs: Sequence[Path]) -> Task:
    """Read the shards' index and split it; every process gets the same result.

    Where the experiment does not name its emotions, the task has those of the default that some utterance has:
    `SearchSpace.over` makes them those of the trials too.

    Raises UserError if the protocol does not fit the speakers, or fewer than two emotions are left.
    """
    everything = shards.read_index(list(shard_dirs))
    emotions, absent = _emotions(everything, experiment)
    index = labelled(everything, emotions, experiment.merge, experiment.label)
    excluded = None
    if experiment.exclude:
        known = everything["utterance_id"].to_pylist()
        index, excluded = exclusion.without(index, experiment.exclude, known, lambda: same_recordings_in(shard_dirs))
    index = unlabelled.added(index, everything, experiment.distil, emotions)
    fold = make_fold(index, experiment.protocol)
    splits = pa.array([fold.splits.get(i) for i in index["utterance_id"].to_pylist()], pa.string())
    index = index.rename_columns({"split": "own_split"}).append_column("split", splits).filter(splits.is_valid())
    words = f"{fold.description}{f'; excluded utterances: {excluded.num_rows}' if excluded is not None else ''}"
    return Task(emotions, index.combine_chunks(), words, fold.leaky, fold.common_emotions, absent, excluded)


def fold_path(experiment: Experiment, shard_dirs: Sequence[Path], folds: Path) -> Path:
    """The file of an experiment's fold in the directory ``folds``; its name is a digest of all that the fold depends
    on."""
    given = experiment.protocol.given
    table = Path(given).read_text(encoding="utf-8") if isinstance(given, str) and given.endswith(".csv") else ""
    listed = [sorted(exclusion.read_list(what)) for what in experiment.exclude if what not in config.EXCLUDABLE]
    excluded = (experiment.exclude, listed) if experiment.exclude else ()
    distil = experiment.distil
    answered_by = (distil.answers, distil.unlabelled) if distil.unlabelled else ()
    deciding = (experiment.protocol.split(), table, experiment.emotions, experiment.merge, experiment.label)
    directories = [str(directory) for directory in shard_dirs]
    return folds / f"{config.fingerprint(*deciding, *excluded, *answered_by, directories)}.parquet"


def write_fold(experiment: Experiment, shard_dirs: Sequence[Path], folds: Path) -> Path:
    """The fold's file, which is written if it is missing. Raises what `load_task` raises."""
    path = fold_path(experiment, shard_dirs, folds)
    if not path.is_file():
        load_task(experiment, shard_dirs).write(path)
    return path


# -- below: how it is done


def _emotions(index: pa.Table, experiment: Experiment) -> tuple[tuple[str, ...], str]:
    """The emotions of a task, and a line about those of the experiment that are absent from the whole index."""
    present = merged(index, experiment.merge, experiment.label).unique().drop_null().to_pylist()
    absent = [emotion for emotion in experiment.emotions if emotion not in present]
    left = tuple(emotion for emotion in experiment.emotions if emotion in present)
    if not absent or not left:  # `labelled` says that nothing is left
        return experiment.emotions, ""
    if "emotions" in experiment.model_fields_set:
        lines = (f"no utterance is {emotion}{hint(emotion, present, '')}" for emotion in absent)
        return experiment.emotions, f"experiment.emotions: {'; '.join(lines)}"
    if len(left) < 2:
        raise UserError(
            f"experiment.emotions: of the default, the corpora have only {left[0]}; name two or more of what they "
            f"have: {shortened(', '.join(sorted(present)), 160)}"
        )
    return left, f"left out, as no utterance is one: {', '.join(absent)} (an error if experiment.emotions names them)"
