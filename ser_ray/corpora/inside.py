"""Tables that hold the recordings themselves: Parquet with a column ``audio``, and a saved folder of Hugging Face's
datasets (``hf:DIR``). They are unpacked once, to files and a table that `ser_ray.corpora.table` reads.

``audio`` is the bytes of a file (WAV, FLAC, ...), its path, or a struct with ``bytes`` and ``path``, as the datasets
library writes it; where it leaves the bytes out (``Dataset.to_parquet``), the file at ``path`` is linked. A folder that
``Dataset.save_to_disk`` wrote has .arrow files; one that was downloaded from the hub has .parquet files; the split is
in the name of their folder or of the file. Numbers of a ``ClassLabel`` become its names, which the file's own metadata
has. Nothing of a dataset is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.corpora.rows import COLUMNS, SPLITS
from ser_ray.corpora.table import text_rows
from ser_ray.disk import read_json, replacing
from ser_ray.schema import UserError, reason_of, shortened

VERSION: Final = 2
"""Raised when what `unpack` writes changes."""
TABLE: Final = "table.parquet"
STATE: Final = "state.json"
"""Of a saved folder: which of the files in it are its own. Saving again leaves the files of before."""
AUDIO: Final = "audio"
SUFFIXES: Final = (".arrow", ".parquet")
NAMES: Final = {
    "emotion": ("emotion", "label", "labels"),
    "speaker": ("speaker", "speaker_id", "spk_id"),
    "text": ("text", "transcription", "sentence"),
}
"""Column -> the names that it has in datasets, the first that is there."""
BATCH: Final = 64
"""Rows that are read at once: some ten megabytes of audio."""
LONGEST: Final = 200
"""Bytes of a file's name; file systems allow 255, and names beside it are made from it."""
MAGIC: Final = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3"}
"""How files begin -> the suffix of one whose name is not known."""


def holds_recordings(path: Path) -> bool:
    """Whether a Parquet file has its recordings in a column ``audio``: no column ``path`` names files of them."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if AUDIO not in schema.names or not _may_be_audio(schema.field(AUDIO).type):
                return False
            if "path" not in schema.names:
                return True
            batch = next(file.iter_batches(batch_size=1, columns=["path"]), None)
            first = None if batch is None else next(text_rows(pa.Table.from_batches([batch])), None)
    except (pa.ArrowException, OSError):
        return False  # `table.read` says what is wrong
    return first is None or not os.path.isfile(path.parent / first["path"])  # noqa: PTH113  (false for impossible names)


def files_of(path: Path) -> dict[Path, str]:
    """The files of a table or a folder, in order, and the split that each is named after, if any.

    Raises UserError where there is none.
    """
    if path.is_file():
        return {path: ""}
    own = cache(_own_files)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and not file.name.startswith((".", "cache-"))  # cache-: what the library computed
        if (names := own(file.parent)) is None or file.name in names
    )
    if not files:
        raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file in it; give the folder that save_to_disk wrote")
    return {file: _split_of(file, path) for file in files}


def unpack(path: Path, directory: Path, on_progress: Callable[[int], None] = lambda done: None) -> Path:
    """Write the recordings of a table or folder to ``directory``, the table of them last; returns its path.

    Nothing is done if it is there already. ``on_progress`` gets the recordings done. Raises UserError for files that
    cannot be read, or lack a column.
    """
    target = directory / TABLE
    if target.is_file():
        return target
    rows: list[dict[str, str]] = []
    used: set[str] = set()
    for file, split in files_of(path).items():
        try:
            for batch in _batches(file):
                audio = _contents(batch)
                for (content, named), row in zip(audio, text_rows(_wanted(batch)), strict=True):
                    place = _place(directory, content, named, len(rows) + 1, used, file.parent)
                    rows.append({"split": split, "speaker": "unknown"} | row | {"path": place})
                    on_progress(len(rows))
        except (pa.ArrowException, OSError, KeyError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            raise UserError(f"{file}: not readable: {reason_of(error)}") from None
    with replacing(target) as aside:
        columns = [column for column in COLUMNS if any(column in row for row in rows)]
        pq.write_table(pa.table({c: pa.array([row.get(c, "") for row in rows], pa.string()) for c in columns}), aside)
    return target


# -- below: how it is done


def _own_files(folder: Path) -> set[str] | None:
    """The files that `STATE` names; None without it."""
    state = folder / STATE
    if not state.is_file():
        return None
    try:
        return {str(entry["filename"]) for entry in read_json(state)["_data_files"]}
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{state}: does not name the files of a saved dataset") from None


def _split_of(file: Path, folder: Path) -> str:
    """``train/data-00000-of-00001.arrow``, ``train-00000-of-00002.parquet``."""
    words = [*(part for part in file.relative_to(folder).parts[:-1]), file.stem.split("-")[0]]
    return next((word for word in words if word.lower() in SPLITS), "")


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    if file.suffix.lower() == ".parquet":
        with pq.ParquetFile(file) as parquet:
            _check(file, parquet.schema_arrow)
            yield from parquet.iter_batches(batch_size=BATCH)
        return
    with pa.memory_map(str(file)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            opened = pa.ipc.open_file(source)
            _check(file, opened.schema)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
            return
        _check(file, reader.schema)
        yield from reader


def _check(file: Path, schema: pa.Schema) -> None:
    chosen = _chosen(schema.names)
    if AUDIO not in schema.names or "emotion" not in chosen:
        lacking = AUDIO if AUDIO not in schema.names else "emotion"
        raise UserError(f"{file}: no column {lacking!r}; it has {shortened(', '.join(schema.names))}")


def _chosen(names: Sequence[str]) -> dict[str, str]:
    """Column of ours -> its name in a file, in small or capital letters, for those that are there."""
    candidates = {column: NAMES.get(column, (column,)) for column in COLUMNS if column != "path"}
    ours = {name.lower(): name for name in reversed(names)}
    found = {column: [ours[name] for name in known if name in ours] for column, known in candidates.items()}
    return {column: known[0] for column, known in found.items() if known}


def _wanted(batch: pa.RecordBatch) -> pa.Table:
    """The columns of ours, under our names, with the names of classes for their numbers."""
    classes = _class_names(batch.schema)
    columns = {}
    for column, name in _chosen(batch.schema.names).items():
        values = batch.column(name)
        if name in classes and pa.types.is_integer(values.type):
            known = classes[name]
            numbers = values.to_pylist()
            values = pa.array([known[n] if n is not None and 0 <= n < len(known) else None for n in numbers])
        columns[column] = values
    return pa.table(columns)


def _class_names(schema: pa.Schema) -> Mapping[str, Sequence[str]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: [str(c) for c in f["names"]] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):  # not from the datasets library
        return {}


def _may_be_audio(kind: pa.DataType) -> bool:
    """Whether a type is that of bytes, or of a struct with such; not of paths as text."""
    fields = {kind.field(number).name for number in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    return "bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _contents(batch: pa.RecordBatch) -> Iterator[tuple[bytes | None, str]]:
    """The bytes and the name of every recording."""
    names = batch.column("path").to_pylist() if "path" in batch.schema.names else [None] * batch.num_rows
    for value, name in zip(batch.column(AUDIO).to_pylist(), names, strict=True):
        value = {"path": value} if isinstance(value, str) else value
        content, named = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        yield content if isinstance(content, bytes) else None, str(named or name or "")


def _place(directory: Path, content: bytes | None, named: str, number: int, used: set[str], folder: Path) -> str:
    """Write one recording, or link the file that it is; returns its name. That of a file which is not there is kept,
    for the message."""
    if content is None and not (named and os.path.isfile(folder / named)):  # noqa: PTH113  (false for impossible names)
        return named
    target = directory / _name(content or b"", named, number, used)
    if content is None:
        with suppress(FileExistsError):  # of an unpacking that was interrupted, as below
            target.symlink_to((folder / named).resolve())
    elif not (target.is_file() and target.stat().st_size == len(content)):
        with replacing(target) as aside:
            aside.write_bytes(content)
    return target.name


def _name(content: bytes, named: str, number: int, used: set[str]) -> str:
    """A name for a recording, once each. Of that in the table only the last part is used."""
    name = PurePosixPath(named.replace("\\", "/")).name
    if not name or name.startswith(".") or len(name.encode()) > LONGEST or not name.isprintable():
        name = str(number) + next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), "")
    if name.lower() in used or name == TABLE:
        name = f"{Path(name).stem}-{number}{Path(name).suffix}"
    used.add(name.lower())
    return name
