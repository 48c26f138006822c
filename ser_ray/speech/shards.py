"""The form in which prepared speech is kept: a directory of Parquet shards with a manifest that is written last.

One directory holds one corpus. Folds are no part of it: one set of shards serves every protocol. The audio is
uncompressed int16, which Parquet reads several times faster than lists or compressed audio; the other columns are zstd.
A directory without ``manifest.json`` is not whole and is never read; every file is written aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import ser_ray
from ser_ray.config import Audio, to_dict
from ser_ray.disk import replacing, write_json
from ser_ray.schema import TIE, Rejected, UserError

FORMAT: Final = 3
"""Raised when the meaning of a shard changes; part of the fingerprint of prepared data."""

SCHEMA: Final = pa.schema(
    [
        pa.field("utterance_id", pa.string(), nullable=False),
        pa.field("corpus", pa.string(), nullable=False),
        pa.field("speaker", pa.string(), nullable=False),
        pa.field("emotion", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),  # relative to the corpus's directory
        pa.field("duration", pa.float64(), nullable=False),  # s
        pa.field("num_samples", pa.int32(), nullable=False),
        pa.field("text_id", pa.string()),
        pa.field("intensity", pa.string()),
        pa.field("gender", pa.string()),
        pa.field("language", pa.string()),
        pa.field("split", pa.string()),
        pa.field("perceived", pa.string()),
        pa.field("agreement", pa.float64()),
        pa.field("audio_sha256", pa.string(), nullable=False),  # of the bytes in audio: finds identical recordings
        pa.field("audio", pa.large_binary(), nullable=False),  # int16 little-endian mono 16 kHz
    ]
)
INDEX_COLUMNS: Final = tuple(name for name in SCHEMA.names if name != "audio")
MANIFEST: Final = "manifest.json"


def write_shard(table: pa.Table, path: Path) -> None:
    """Write a table of `SCHEMA` as one Parquet file, atomically."""
    compression = dict.fromkeys(INDEX_COLUMNS, "zstd") | {"audio": "none"}
    columns = list(INDEX_COLUMNS)
    with replacing(path) as aside:
        pq.write_table(
            table.cast(SCHEMA), aside, compression=compression, use_dictionary=columns, write_statistics=columns
        )


def write_manifest(
    directory: Path,
    corpus: str,
    shards: Sequence[str],
    rejected: Iterable[Rejected],
    audio: Audio,
    flagged: Iterable[Rejected] = (),
) -> dict[str, Any]:
    """Describe the shards and thereby declare the directory whole; returns the manifest.

    ``content_sha256`` covers every row in order of id, with the digest of its audio: equal data, equal digest, however
    the rows are spread over files. ``flagged`` recordings are used, but worth a look. ``ties`` counts those whose
    listeners did not agree on one emotion.
    """
    index = _read([directory / name for name in shards]).sort_by("utterance_id")
    manifest = {
        "format": FORMAT,
        "corpus": corpus,
        "utterances": index.num_rows,
        "speakers": len(index["speaker"].unique()),
        "hours": sum(index["duration"].to_pylist()) / 3600,
        "emotions": dict(Counter(index["emotion"].to_pylist())),
        "ties": index["perceived"].to_pylist().count(TIE),
        "rejected": _findings(rejected),
        "flagged": _findings(flagged),
        "content_sha256": hashlib.sha256(json.dumps(index.to_pylist(), sort_keys=True).encode()).hexdigest(),
        "shards": list(shards),
        "audio": to_dict(audio),
        "versions": {"ser_ray": ser_ray.__version__}
        | {name: version(name) for name in ("librosa", "numpy", "pyarrow", "soundfile", "soxr")},
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def is_whole(directory: Path) -> bool:
    """Whether the directory was prepared to its end."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory of shards.

    Raises UserError where the directory is not whole, or was written in another format.
    """
    if not is_whole(directory):
        raise UserError(f"{directory}: not prepared, or not to the end; run ser-ray prepare")
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise UserError(f"{directory}: shards of format {manifest['format']}, not {FORMAT}; run ser-ray prepare")
    return dict(manifest)


def shard_paths(directory: Path) -> list[Path]:
    """The shards that the manifest names, in order."""
    return [directory / name for name in read_manifest(directory)["shards"]]


def read_index(directories: Iterable[Path]) -> pa.Table:
    """All columns but the audio, of all shards of all directories, sorted by utterance_id."""
    return _read([path for directory in directories for path in shard_paths(directory)]).sort_by("utterance_id")


def read_tables(directories: Iterable[Path]) -> Iterator[pa.Table]:
    """The shards one by one, with their audio."""
    return read_paths(path for directory in directories for path in shard_paths(directory))


def read_paths(paths: Iterable[Path]) -> Iterator[pa.Table]:
    """Parquet files one by one, whole."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            yield file.read()


def read_ids(path: Path) -> list[str]:
    """The utterances of one shard, or of what was kept of it, in the order of its rows."""
    with pq.ParquetFile(path) as file:
        ids: list[str] = file.read(columns=["utterance_id"])["utterance_id"].to_pylist()
    return ids


def select(table: pa.Table, labels: Mapping[str, int]) -> pa.Table:
    """The rows whose utterance_id is a key of ``labels``, with the label as an int64 column ``label``.

    Where every row stays, as after a split by whole shards, the audio is not copied.

    >>> table = pa.table({"utterance_id": ["a", "b", "c"]})
    >>> select(table, {"c": 1, "a": 0}).to_pydict()
    {'utterance_id': ['a', 'c'], 'label': [0, 1]}
    """
    position = pc.index_in(table["utterance_id"], value_set=pa.array(list(labels), pa.string()))
    label = pc.take(pa.array(list(labels.values()), pa.int64()), position)
    table = table.append_column("label", label)
    return table.filter(label.is_valid()) if label.null_count else table


def _findings(findings: Iterable[Rejected]) -> list[dict[str, str]]:
    return [{"path": f.path, "reason": f.reason} for f in sorted(findings, key=lambda f: (f.path, f.reason))]


def _read(paths: Sequence[Path]) -> pa.Table:
    tables = [SCHEMA.remove(SCHEMA.get_field_index("audio")).empty_table()]
    for path in paths:
        with pq.ParquetFile(path) as file:
            tables.append(file.read(columns=list(INDEX_COLUMNS)))
    return pa.concat_tables(tables)
