"""``audformat:DIR``: a database in audformat, as audb publishes them (https://audeering.github.io/audformat).

DIR holds ``db.yaml`` and a ``db.TABLE.csv`` or ``db.TABLE.parquet`` for every table; databases that were saved as
pickles are refused, since reading one may run what it holds. Used are columns that are called, or have the scheme,
``emotion`` (one for each rater makes them votes), ``speaker``, ``gender`` or ``sex``, ``language`` and
``transcription``; those beside ``emotion`` may be in other tables of the same files or segments, and what is said of a
speaker in the labels of the scheme ``speaker``, or in the misc table that they name. The split is that of the table
(``split_id``). Where tables contradict each other, take those that are not wanted out of ``db.yaml``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.config import read_yaml
from ser_ray.corpora.rows import SPLITS, Row, example_of, utterances_of
from ser_ray.corpora.table import text_rows
from ser_ray.schema import Rejected, UserError, Utterance, reason_of

HEADER: Final = "db.yaml"
MEANINGS: Final = {"gender": ("gender", "sex"), "text": ("transcription", "text"), "language": ("language",)}
"""Column of ours -> columns or schemes of a database. Beside these, speaker and emotion."""
ZERO: Final = re.compile(r"(0 days?)?[ 0:.]*")
"""How a table writes that a segment starts where its file does."""


def read(name: str, path: Path, labels: Mapping[str, str]) -> tuple[list[Utterance], list[Rejected]]:
    """As `ser_ray.corpora.table.read`. Raises UserError for a folder that is no database of emotions."""
    utterances, rejected = utterances_of(name, _rows(path), labels, path, path)
    if not utterances:
        raise UserError(f"{path}: no recording can be used{example_of(rejected)}")
    return utterances, rejected


def folder_of(path: Path) -> Path:
    """The folder that the recordings' paths are relative to."""
    return path


# -- below: how it is done


@dataclass(frozen=True)
class _Table:
    name: str
    schemes: dict[str, str]
    """Column -> its scheme, or its own name."""
    raters: dict[str, str]
    split: str
    level: str
    """Of a misc table: the column that names what its rows are about."""


def _rows(path: Path) -> Iterator[Row]:
    tables, labels = _header(path)
    content = {table.name: list(_content(path, table.name)) for table in tables if _is_used(table)}
    speakers = _of_speakers(path, labels)
    known: dict[tuple[str, str, str], dict[str, str]] = {}  # file or segment -> what all tables say of it
    for table in tables:
        for row in content.get(table.name, ()):
            about = _about(table.schemes, row) | {"split": table.split}
            known.setdefault(_place(row), {}).update({column: value for column, value in about.items() if value})
    seen: set[tuple[str, ...]] = set()
    for table in tables:
        votes = [column for column, scheme in table.schemes.items() if scheme == "emotion"]
        votes = ["emotion"] if "emotion" in votes else votes
        for number, row in enumerate(content.get(table.name, ()), start=2):
            given = [column for column in votes if row.get(column)]
            for column in given or votes[:1]:  # a rater may leave a recording out
                vote = (*_place(row), row.get(column, ""), table.raters.get(column, ""))
                if vote not in seen:  # tables of splits repeat those of the whole
                    seen.add(vote)
                    found = dict(zip(("path", "start", "end", "emotion", "rater"), vote, strict=True))
                    found |= {"speaker": "unknown"} | known.get((row["file"], "", ""), {}) | known[_place(row)]
                    found = speakers.get(found["speaker"], {}) | found
                    yield found if len(votes) > 1 else found | {"rater": ""}, f"db.{table.name}, line {number}"


def _is_used(table: _Table) -> bool:
    wanted = {"emotion", "speaker", *(scheme for names in MEANINGS.values() for scheme in names)}
    return bool(wanted & set(table.schemes.values()))


def _place(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["file"], row.get("start", ""), row.get("end", "")


def _about(schemes: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    columns = {"speaker": ("speaker",)} | MEANINGS
    return {
        ours: str(row[column])
        for ours, names in columns.items()
        for column, scheme in schemes.items()
        if scheme in names and row.get(column)
    }


def _header(path: Path) -> tuple[list[_Table], Mapping[str, Any] | _Table]:
    """The tables, and the labels of the scheme ``speaker``: by name, or the misc table that has them.

    Raises UserError for a header that does not fit, or has no table of emotions.
    """
    file = path / HEADER
    try:
        header = read_yaml(file.read_text(encoding="utf-8"))
        split_types = {str(name): str(split["type"]) for name, split in (header.get("splits") or {}).items()}
        tables = [_table(str(name), table, split_types) for name, table in (header.get("tables") or {}).items()]
        labels = ((header.get("schemes") or {}).get("speaker") or {}).get("labels")
        if isinstance(labels, str):
            labels = _table(labels, header["misc_tables"][labels], {})
    except OSError:
        raise UserError(f"{path}: no {HEADER} in it; give the folder of a database in audformat") from None
    except Exception as error:  # whatever a stranger's YAML holds in place of what belongs there
        raise UserError(f"{file}: not the header of a database: {reason_of(error)}") from None
    if not any("emotion" in table.schemes.values() for table in tables):
        raise UserError(f"{file}: no table has a column emotion; it has {', '.join(t.name for t in tables) or 'none'}")
    return tables, labels if isinstance(labels, Mapping | _Table) else {}


def _of_speakers(path: Path, labels: Mapping[str, Any] | _Table) -> dict[str, dict[str, str]]:
    """Speaker -> gender and language."""
    if isinstance(labels, _Table):
        return {row.get(labels.level, ""): _about(labels.schemes, row) for row in _read(path, labels.name)}
    described = {str(speaker): about for speaker, about in labels.items() if isinstance(about, dict)}
    return {speaker: _about({str(key): str(key) for key in about}, about) for speaker, about in described.items()}


def _table(name: str, table: Any, split_types: Mapping[str, str]) -> _Table:
    columns = {str(column): about or {} for column, about in (table.get("columns") or {}).items()}
    split = split_types.get(str(table.get("split_id")), str(table.get("split_id") or ""))
    return _Table(
        name,
        {column: column if column == "emotion" else str(c.get("scheme_id", column)) for column, c in columns.items()},
        {column: str(about.get("rater_id", column)) for column, about in columns.items()},
        split if split in SPLITS else "",
        str(next(iter(table.get("levels") or ()), "")),
    )


def _content(path: Path, name: str) -> Iterator[dict[str, str]]:
    """The rows of a table of files or segments; a segment that is all of its file has no start."""
    for row in _read(path, name):
        if row.get("file"):
            if not row.get("end") and ZERO.fullmatch(row.get("start", "")):
                row["start"] = ""
            yield row


def _read(path: Path, name: str) -> Iterator[dict[str, str]]:
    if Path(name).name != name:
        raise UserError(f"{path / HEADER}: the table {name!r} is not the name of a file")
    text, parquet = path / f"db.{name}.csv", path / f"db.{name}.parquet"
    try:
        if parquet.is_file():
            rows = text_rows(pq.read_table(parquet))
        elif text.is_file():
            with text.open(encoding="utf-8-sig", newline="") as file:
                rows = iter(list(csv.DictReader(file)))
        else:
            raise UserError(f"{path}: the table {name} is in no file {text.name} or {parquet.name}")
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the table {name} is not readable: {reason_of(error)}") from None
    for row in rows:
        yield {key: "" if value in (None, "NaT") else value for key, value in row.items()}
