"""Any corpus that is described by a CSV or Parquet file with one row per utterance.

Columns: path, speaker, emotion; and, where known, split (train, dev or test), text, language, gender, start and end
(seconds, of a part of a recording). Paths are relative to the file's folder. A table is one corpus, named by its key
under ``experiment.corpora``; split a table of several corpora.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.schema import EMOTIONS, Rejected, UserError, Utterance

SUFFIXES: Final = (".csv", ".parquet")
REQUIRED: Final = ("path", "speaker", "emotion")
OPTIONAL: Final = ("split", "text", "language", "gender", "start", "end")
SPLITS: Final = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "development": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "eval": "test",
}
"""Common names of the splits."""


def read(name: str, path: Path, labels: Mapping[str, str]) -> tuple[list[Utterance], list[Rejected]]:
    """The utterances of the corpus ``name``, sorted by id, and the rows that are not used, with reasons.

    ``labels`` maps values of the column emotion to emotions; a value that is not in it must already be an emotion.

    Raises UserError for a file that cannot be read, lacks a column, or has no row that can be used; and for a label
    that is not an emotion.
    """
    if unknown := sorted(set(labels.values()) - set(EMOTIONS)):
        raise UserError(f"experiment.labels.{name}: {unknown[0]!r} is not an emotion; they are {', '.join(EMOTIONS)}")
    utterances: dict[str, Utterance] = {}
    rejected: list[Rejected] = []
    for row, line in _rows(path):
        try:
            utterance = _utterance(name, row, labels, path.parent)
        except ValueError as reason:
            rejected.append(Rejected(row.get("path") or f"line {line}", f"line {line}: {reason}"))
            continue
        if utterances.setdefault(utterance.utterance_id, utterance) is not utterance:
            rejected.append(Rejected(utterance.path, f"line {line}: the same utterance again"))
    if not utterances:
        such = f", such as {rejected[0].path}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{path}: no row can be used{such}; set experiment.labels.{name} or fix the table")
    return sorted(utterances.values(), key=lambda utterance: utterance.utterance_id), rejected


# -- below: how it is done


def _rows(path: Path) -> Iterator[tuple[dict[str, str], int]]:
    """Rows as text, empty where a value is missing, each with its line (its number, for Parquet)."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as table:
                wanted = _known_columns(path, table.schema_arrow.names)
                rows = table.read(columns=wanted).to_pylist()  # other columns may hold the audio itself
            for number, row in enumerate(rows, start=1):
                yield {key: "" if value is None else str(value) for key, value in row.items()}, number
            return
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            wanted = _known_columns(path, list(reader.fieldnames or ()))
            for fields in reader:
                if any(fields.get(None) or ()):
                    raise UserError(f"{path}, line {reader.line_num}: more fields than columns; quote text with commas")
                yield {column: (fields[column] or "").strip() for column in wanted}, reader.line_num
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]}: {' '.join(str(error).split())}") from None


def _known_columns(path: Path, columns: list[str]) -> list[str]:
    if missing := [column for column in REQUIRED if column not in columns]:
        raise UserError(
            f"{path}: no column {missing[0]!r}; it has {', '.join(columns)}, and needs {', '.join(REQUIRED)}"
        )
    known = [column for column in columns if column in REQUIRED + OPTIONAL]
    if twice := [column for column in known if known.count(column) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} occurs more than once; keep one")
    return known


def _utterance(name: str, row: Mapping[str, str], labels: Mapping[str, str], folder: Path) -> Utterance:
    for column in REQUIRED:
        if not row[column]:
            raise ValueError(f"no {column}")
    emotion = labels.get(row["emotion"], row["emotion"])
    if emotion not in EMOTIONS:
        raise ValueError(f"emotion {row['emotion']!r} is not known, and not in experiment.labels.{name}")
    split = row.get("split", "")
    if split and split.lower() not in SPLITS:
        raise ValueError(f"split {split!r} is not one of train, dev, test")
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"ends at {end:g} s, before it begins at {start or 0:g} s")
    if not os.path.isfile(folder / row["path"]):  # noqa: PTH113  (false, not an error, for an impossible name)
        raise ValueError("no such file")
    path = Path(row["path"])
    part = "" if start is None and end is None else f"#{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"
    return Utterance(
        utterance_id=f"{name}/{path.with_suffix('').as_posix()}{part}",
        corpus=name,
        speaker=f"{name}/{row['speaker']}",
        emotion=emotion,
        path=path.as_posix(),
        text_id=row.get("text") or None,
        gender=row.get("gender") or None,
        language=row.get("language") or None,
        split=SPLITS[split.lower()] if split else None,
        start=start,
        end=end,
    )


def _seconds(row: Mapping[str, str], column: str) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{column} {text!r} is not a time in seconds")
    return seconds
