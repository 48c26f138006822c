"""Any corpus that is described by a CSV, TSV or Parquet file with one row per utterance.

Columns: path, speaker, emotion; and, where known, split (train, dev or test), text, language, gender, start and end
(seconds, of a part of a recording), rater (for a row per vote). Paths are relative to the file's folder. A table is one
corpus, named by its key under ``experiment.corpora``; split a table of several corpora. `ser_ray.corpora.rows` has the
rules.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.corpora.rows import COLUMNS, NO_VALUE, NOT_KNOWN, REQUIRED, Row, example_of, utterances_of
from ser_ray.schema import Rejected, UserError, Utterance, reason_of, shortened, unknown_speaker

DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
SUFFIXES: Final = (*DELIMITERS, ".parquet")
OTHER_DELIMITERS: Final = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def is_table(path: str | Path) -> bool:
    """Whether a path is a table's, by its suffix, in small or capital letters."""
    return Path(path).suffix.lower() in SUFFIXES


def read(name: str, path: Path, labels: Mapping[str, str]) -> tuple[list[Utterance], list[Rejected]]:
    """The utterances of the corpus ``name``, sorted by id, and the rows that are not used, with reasons.

    ``labels`` maps values of the column emotion to emotions.

    Raises UserError for a file that cannot be read, lacks a column, has rows that contradict each other, or no row that
    can be used.
    """
    utterances, rejected = utterances_of(name, rows_of(path), labels, path.parent, path)
    if not utterances:
        raise UserError(f"{path}: no row can be used{example_of(rejected)}; fix the table")
    return utterances, rejected


def recordings_of(path: Path) -> list[tuple[Path, str]]:
    """The recordings of a table with the columns path and speaker, each with its speaker, in order; for `predict`.

    Raises UserError for a file that cannot be read, lacks a column or has no row, and for a row without a path or of a
    part of a recording.
    """
    found = []
    for row, where in rows_of(path, ("path", "speaker")):
        if row["path"] in NO_VALUE:
            raise UserError(f"{path}, {where}: no path")
        if row.get("start") or row.get("end"):
            raise UserError(f"{path}, {where}: start and end are not read here; cut the recording, or leave them out")
        speaker = row["speaker"]
        known = speaker not in NO_VALUE and speaker.lower() not in NOT_KNOWN
        found.append((path.parent / row["path"], f"table/{speaker}" if known else unknown_speaker("table", where)))
    if not found:
        raise UserError(f"{path}: it has no row")
    return found


def rows_of(path: Path, required: Sequence[str] = REQUIRED) -> Iterator[Row]:
    """Rows as text, empty where a value is missing, each with its line (its number, for Parquet).

    ``required``: the columns that have to be there. Raises UserError for a file that cannot be read, or lacks a column.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _rows_of_parquet(path, required)
            return
        delimiter = DELIMITERS[path.suffix.lower()]
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            wanted = _known_columns(path, list(reader.fieldnames or ()), required, delimiter)
            for fields in reader:
                if any(fields.get(None) or ()):
                    raise UserError(
                        f"{path}, line {reader.line_num}: more fields than columns; quote text that contains "
                        f"{OTHER_DELIMITERS[delimiter]}"
                    )
                yield {column: (fields[column] or "").strip() for column in wanted}, f"line {reader.line_num}"
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
        kind = path.suffix[1:].lower()
        raise UserError(f"{path}: not readable as {kind}: {reason_of(error)}") from None


def as_text(value: object) -> str:
    """A value of a Parquet or Arrow file as text: lengths of time in seconds, nothing for what is missing.

    >>> as_text(timedelta(milliseconds=1500)), as_text(float("nan")), as_text(None), as_text(b"sad")
    ('1.5', '', '', 'sad')
    """
    if value is None or value != value:  # NaN and pandas' NaT differ from themselves
        return ""
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.10g}"
    return value.decode() if isinstance(value, bytes) else str(value)


def text_rows(table: pa.Table) -> Iterator[dict[str, str]]:
    """The rows of an Arrow table as text. Raises ArrowInvalid for a value that is none, such as a date beyond the year
    9999 or bytes that are not UTF-8."""
    for number, field in enumerate(table.schema):
        if pa.types.is_duration(field.type):  # Python knows microseconds
            table = table.set_column(number, field.name, table.column(number).cast(pa.duration("us"), safe=False))
    try:
        for row in table.to_pylist():
            yield {key: as_text(value) for key, value in row.items()}
    except (ValueError, OverflowError) as error:
        raise pa.ArrowInvalid(str(error)) from None


# -- below: how it is done


def _rows_of_parquet(path: Path, required: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        wanted = _known_columns(path, file.schema_arrow.names, required)
        table = file.read(columns=wanted)  # other columns may hold the audio itself
    for number, row in enumerate(text_rows(table), start=1):
        yield row, f"row {number}"


def _known_columns(path: Path, columns: Sequence[Any], required: Sequence[str], delimiter: str = "") -> list[str]:
    if missing := [column for column in required if column not in columns]:
        others = [words for sign, words in OTHER_DELIMITERS.items() if len(columns) == 1 and sign in columns[0]]
        if delimiter and others:
            header = shortened(repr(columns[0]))
            raise UserError(
                f"{path}: its columns seem to be separated by {others[0]}: {header}; separate them by commas (.csv) or "
                "tabs (.tsv)"
            )
        unknown = "; where no speaker is known, write unknown" if missing[0] == "speaker" else ""
        has, needs = shortened(", ".join(columns)), ", ".join(required)
        raise UserError(f"{path}: no column {missing[0]!r}; it has {has}, and needs {needs}{unknown}")
    known = [column for column in columns if column in COLUMNS]
    if twice := [column for column in known if known.count(column) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} occurs more than once; keep one")
    return known
