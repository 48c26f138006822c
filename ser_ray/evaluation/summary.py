"""The evaluation record: what `evaluate` writes for a split, and what `report` shows.

`summarise` makes ``evaluation/<split>.json``; `write_predictions` saves what every metric can be recomputed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ser_ray.disk import replacing
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import accuracy, confusion, ece, headline, per_emotion, uar
from ser_ray.evaluation.predictions import COLUMNS, PROBABILITY, Predictions
from ser_ray.schema import UserError


def summarise(predictions: Predictions, protocol: dict[str, Any], leaky: bool, seed: int = 0) -> dict[str, Any]:
    """All metrics of one split, as plain JSON types.

    Args:
        predictions: of N utterances.
        protocol: how the split was made; stored as it is.
        leaky: whether train and this split share speakers or recordings.
        seed: of the bootstrap.

    Returns:
        n, the headline metrics, ``ci95`` (metric -> [low, high]) and ``ci95_unit``, ``confusion`` (K rows, true) with
        its ``labels`` (the emotions' names), ``per_emotion`` (precision, recall, f1, n), ``per_corpus`` and
        ``per_speaker`` (n, accuracy, uar), ``ece``, ``protocol``, ``leaky``.

    Raises:
        UserError: there are no utterances, or the probabilities are NaN or infinite.
    """
    if not len(predictions):
        raise UserError("no utterances to evaluate: the split is empty; check experiment.protocol and the corpora")
    if broken := int((~np.isfinite(predictions.probabilities)).any(axis=1).sum()):
        raise UserError(
            f"{broken} of {len(predictions)} utterances have probabilities that are NaN or infinite: training "
            "diverged; lower experiment.optimizer.lr"
        )
    labels, predicted, emotions = predictions.labels, predictions.predicted, predictions.emotions
    matrix = confusion(labels, predicted, len(emotions))
    limits, unit = bootstrap_ci95(labels, predicted, predictions.speakers, len(emotions), seed=seed)
    per_label = {name: values.tolist() for name, values in per_emotion(matrix).items()}
    return {
        "n": len(predictions),
        **{name: float(value) for name, value in headline(matrix).items()},
        "ci95": {name: list(interval) for name, interval in limits.items()},
        "ci95_unit": unit,
        "labels": list(emotions),
        "confusion": matrix.tolist(),
        "per_emotion": {
            emotion: {name: values[k] for name, values in per_label.items()} for k, emotion in enumerate(emotions)
        },
        "per_corpus": _by_group(labels, predicted, predictions.corpora, len(emotions)),
        "per_speaker": _by_group(labels, predicted, predictions.named_speakers, len(emotions)),
        "ece": ece(labels, predictions.probabilities),
        "protocol": protocol,
        "leaky": bool(leaky),
    }


def write_predictions(predictions: Predictions, split: str, path: Path) -> None:
    """Write one split's predictions to Parquet; other splits in the file are kept, the same split is replaced.

    Columns utterance_id, corpus, speaker, split, emotion, predicted, and p_<emotion> for each emotion in order.

    Raises UserError if the file holds predictions of other emotions.
    """
    columns = predictions.columns(split)
    types = {name: pa.string() if name in COLUMNS else pa.float64() for name in columns}
    table = pa.table(columns, pa.schema(types))
    if path.exists():
        before = pq.read_table(path)
        if before.column_names != table.column_names:
            raise UserError(
                f"{path}: holds emotions {_emotions_of(before, path)}, not {predictions.emotions}; move the file away"
            )
        table = pa.concat_tables([before.filter(pc.not_equal(before["split"], split)), table])
    with replacing(path) as aside:
        pq.write_table(table, aside)


def read_predictions(path: Path) -> dict[str, Predictions]:
    """Split -> its predictions, from a file of `write_predictions`.

    Raises UserError if the file is missing or has other columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; ser-ray evaluate writes it")
    table = pq.read_table(path)
    emotions = _emotions_of(table, path)
    index = {emotion: k for k, emotion in enumerate(emotions)}
    read = {}
    for split in table["split"].unique().to_pylist():
        rows = table.filter(pc.equal(table["split"], split))
        read[split] = Predictions(
            emotions=emotions,
            utterance_ids=tuple(rows["utterance_id"].to_pylist()),
            corpora=tuple(rows["corpus"].to_pylist()),
            speakers=tuple(rows["speaker"].to_pylist()),
            labels=np.array([index[emotion] for emotion in rows["emotion"].to_pylist()], dtype=np.int64),
            probabilities=np.stack([rows[PROBABILITY + emotion].to_numpy() for emotion in emotions], axis=1),
        )
    return read


def _emotions_of(table: pa.Table, path: Path) -> tuple[str, ...]:
    if tuple(table.column_names[: len(COLUMNS)]) != COLUMNS:
        raise UserError(f"{path}: has columns {table.column_names}, not {list(COLUMNS)} and {PROBABILITY}<emotion>")
    return tuple(name.removeprefix(PROBABILITY) for name in table.column_names[len(COLUMNS) :])


def _by_group(
    labels: np.ndarray, predicted: np.ndarray, groups: Sequence[str], num_labels: int
) -> dict[str, dict[str, float]]:
    """Group (a corpus or a speaker) -> n, accuracy, uar; in alphabetical order."""
    metrics: dict[str, dict[str, float]] = {}
    groups_N = np.asarray(groups)
    for group in sorted(set(groups)):
        mine = groups_N == group
        matrix = confusion(labels[mine], predicted[mine], num_labels)
        metrics[group] = {"n": int(mine.sum()), "accuracy": float(accuracy(matrix)), "uar": float(uar(matrix))}
    return metrics
