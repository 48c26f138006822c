"""Recordings without labels among the utterances of a task: train, with what a teacher answers to them for labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.config import Distil
from ser_ray.protocols.answers import read_answers
from ser_ray.protocols.folds import UNLABELLED

WORD: Final = "unlabelled"
"""In place of an emotion in the table of a corpus without labels; no experiment has it among its emotions."""


def added(index: pa.Table, everything: pa.Table, settings: Distil, emotions: Sequence[str]) -> pa.Table:
    """A labelled index with the utterances of `Distil.unlabelled`, which are those of ``everything`` in these corpora;
    the same index where there are none. Their label is the most probable emotion in `Distil.answers`.

    Raises UserError as `read_answers`.
    """
    if not settings.unlabelled:
        return index
    rows = everything.filter(pc.is_in(everything["corpus"], pa.array(settings.unlabelled)))
    labels = _most_probable(rows["utterance_id"].to_pylist(), Path(str(settings.answers)), emotions)
    names = pa.array([emotions[label] for label in labels], pa.string())
    rows = rows.set_column(rows.column_names.index("emotion"), "emotion", names)
    rows = rows.append_column("label", pa.array(labels, pa.int64())).append_column(UNLABELLED, _all(True, rows))
    whole = pa.concat_tables([index.append_column(UNLABELLED, _all(False, index)), rows.cast(_schema(index))])
    return whole.unify_dictionaries().combine_chunks()


# -- below: how it is done


def _most_probable(ids: Sequence[str], path: Path, emotions: Sequence[str]) -> list[int]:
    answered, probabilities_NK = read_answers(path, emotions, ids, "utterances")
    best_of = dict(zip(answered, probabilities_NK.argmax(axis=1).tolist(), strict=True))
    return [best_of[utterance_id] for utterance_id in ids]


def _all(value: bool, rows: pa.Table) -> pa.Array:
    return pa.array(np.full(rows.num_rows, value))


def _schema(index: pa.Table) -> pa.Schema:
    return index.schema.append(pa.field(UNLABELLED, pa.bool_()))
