"""What a teacher answers to utterances: the file `Distil.answers`, which ``ser-ray distil`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ser_ray.evaluation.predictions import PROBABILITY
from ser_ray.schema import UserError


def read_answers(
    path: Path, emotions: Sequence[str], ids: Iterable[str], utterances: str
) -> tuple[list[str], np.ndarray]:
    """The utterances of the file, and the teacher's probabilities of them, (N, K) float64.

    Raises UserError where the file is missing, is about other emotions, or lacks one of ``ids``, which are
    ``utterances`` in its words.
    """
    if not path.is_file():
        raise UserError(f"distil.answers: {path} is missing; run ser-ray distil again, which writes it")
    table, columns = pq.read_table(path), [PROBABILITY + emotion for emotion in emotions]
    if table.column_names != ["utterance_id", *columns]:
        raise UserError(f"distil.answers: {path} is about other emotions than {', '.join(emotions)}")
    answered = table["utterance_id"].to_pylist()
    if missing := sorted(set(ids).difference(answered)):
        raise UserError(
            f"distil.answers: {path} has no answer to {len(missing)} {utterances}, such as {missing[0]}; run ser-ray "
            "distil again"
        )
    return answered, np.stack([table[name].to_numpy() for name in columns], axis=1)
