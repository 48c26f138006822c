"""The format of prepared speech: a directory of Parquet shards with a manifest that is written last.

One directory holds one corpus. Folds are not stored in it: one set of shards serves every protocol. The audio is
uncompressed int16, which Parquet reads several times faster than lists or compressed audio; the other columns are zstd.
Rows come in groups of `order.PIECE`, each of which can be read alone.
A directory without ``manifest.json`` is incomplete and never read; every file is written under a temporary name and
renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import ser_ray
from ser_ray.config import Audio, to_dict
from ser_ray.disk import replacing, write_json
from ser_ray.schema import TIE, Rejected, UserError, is_known
from ser_ray.speech.order import PIECE

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
NO_FILES: Final[Mapping[str, Any]] = {}


def write_shard(table: pa.Table, path: Path) -> None:
    """Write a table of `SCHEMA` as one Parquet file, atomically."""
    compression = dict.fromkeys(INDEX_COLUMNS, "zstd") | {"audio": "none"}
    columns = list(INDEX_COLUMNS)
    with replacing(path) as aside:
        pq.write_table(
            table.cast(SCHEMA),
            aside,
            row_group_size=PIECE,
            compression=compression,
            use_dictionary=columns,
            write_statistics=columns,
            write_page_checksum=True,
        )


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(directory: Path) -> list[str]:
    """Shards of a whole directory that are missing, cut, or no longer what was written.

    Those that were written since the manifest was, as by a copy without the times, are read for it. What a disk alone
    changes is noticed by the checksums in the file when it is read.
    """
    manifest = read_manifest(directory)
    written = (directory / MANIFEST).stat().st_mtime_ns
    found, changed = [], False
    for name in manifest["shards"]:
        path = directory / name
        if not path.is_file():
            found.append(name)
        elif known := manifest.get("files", {}).get(name):  # older manifests have none
            stat = path.stat()
            changed = changed or stat.st_mtime_ns > written
            if stat.st_size != known["bytes"] or (stat.st_mtime_ns > written and digest(path) != known["sha256"]):
                found.append(name)
    if changed and not found:
        with suppress(OSError):  # of a cache that is only read
            (directory / MANIFEST).touch()
    return found


def write_manifest(
    directory: Path,
    corpus: str,
    shards: Sequence[str],
    rejected: Iterable[Rejected],
    audio: Audio,
    flagged: Iterable[Rejected] = (),
    files: Mapping[str, Any] = NO_FILES,
) -> dict[str, Any]:
    """Write the manifest, which marks the directory as complete, and return it.

    ``content_sha256`` covers every row in order of id, with the digest of its audio: equal data have equal digests,
    however the rows are divided among files. ``flagged`` recordings are used, but may be faulty. ``ties`` counts the
    recordings for which listeners preferred no single emotion, ``unknown_speakers`` the utterances of speakers who are
    not known; ``files`` has the bytes and sha256 of each shard.
    """
    index = _concatenated(_read(directory / name) for name in shards).sort_by("utterance_id")
    speakers = index["speaker"].to_pylist()
    manifest = {
        "format": FORMAT,
        "corpus": corpus,
        "utterances": index.num_rows,
        "speakers": len({speaker for speaker in speakers if is_known(speaker)}),
        "unknown_speakers": sum(not is_known(speaker) for speaker in speakers),
        "hours": sum(index["duration"].to_pylist()) / 3600,
        "emotions": dict(Counter(index["emotion"].to_pylist())),
        "ties": index["perceived"].to_pylist().count(TIE),
        "rejected": _findings(rejected),
        "flagged": _findings(flagged),
        "content_sha256": hashlib.sha256(json.dumps(index.to_pylist(), sort_keys=True).encode()).hexdigest(),
        "shards": list(shards),
        "files": dict(files),
        "audio": to_dict(audio),
        "versions": {"ser_ray": ser_ray.__version__}
        | {name: version(name) for name in ("librosa", "numpy", "pyarrow", "soundfile", "soxr")},
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def is_whole(directory: Path) -> bool:
    """Whether the directory is complete."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory of shards.

    Raises UserError where the directory is incomplete, or was written in another format.
    """
    if not is_whole(directory):
        raise UserError(f"{directory}: not prepared, or incomplete; run ser-ray prepare")
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise UserError(f"{directory}: shards of format {manifest['format']}, not {FORMAT}; run ser-ray prepare")
    return dict(manifest)


def shard_paths(directory: Path) -> list[Path]:
    """The shards that the manifest names, in order."""
    return [directory / name for name in read_manifest(directory)["shards"]]


def read_index(directories: Iterable[Path]) -> pa.Table:
    """All columns but the audio, of all shards of all directories, in their order.

    Two more columns locate the audio: ``shard``, the path of the file, dictionary-encoded, and ``row``, the row in it.
    """
    paths = [path for directory in directories for path in shard_paths(directory)]
    parts = [_read(path) for path in paths]
    sizes = [part.num_rows for part in parts]
    code_N = np.repeat(np.arange(len(paths), dtype=np.int32), sizes)
    row_N = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes] or [np.empty(0, np.int32)])
    shard = pa.DictionaryArray.from_arrays(code_N, pa.array([str(path) for path in paths], pa.string()))
    return _concatenated(parts).append_column("shard", shard).append_column("row", pa.array(row_N))


def read_tables(directories: Iterable[Path]) -> Iterator[pa.Table]:
    """The shards one by one, with their audio."""
    return read_paths(path for directory in directories for path in shard_paths(directory))


def read_paths(paths: Iterable[Path]) -> Iterator[pa.Table]:
    """Parquet files one by one, with all columns."""
    for path in paths:
        with _opened(path) as file:
            yield file.read()


def read_ids(path: Path) -> list[str]:
    """The utterance ids of one shard, or of its cached features, in the order of its rows."""
    with _opened(path) as file:
        ids: list[str] = file.read(columns=["utterance_id"])["utterance_id"].to_pylist()
    return ids


def read_rows(path: Path, row_N: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Rows ``row_N``, ascending, of one shard or of its cached features. Only row groups that contain them are read.

    If these are all rows of those groups, the audio is not copied.
    """
    with _opened(path) as file:
        size_G = np.array([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        first_G = np.cumsum(size_G) - size_G
        group_N = np.searchsorted(first_G, row_N, side="right") - 1
        groups = np.unique(group_N)
        table = file.read_row_groups(groups.tolist(), columns=list(columns))
    before_G = np.zeros(len(size_G), np.int64)  # of the groups that are read, the rows before each
    before_G[groups] = np.cumsum(size_G[groups]) - size_G[groups]
    place_N = row_N - first_G[group_N] + before_G[group_N]
    return table if len(place_N) == table.num_rows else table.take(place_N)


def _findings(findings: Iterable[Rejected]) -> list[dict[str, str]]:
    return [{"path": f.path, "reason": f.reason} for f in sorted(findings, key=lambda f: (f.path, f.reason))]


def _read(path: Path) -> pa.Table:
    with _opened(path) as file:
        return file.read(columns=list(INDEX_COLUMNS))


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Raises UserError for a file that is not what was written, by its checksums."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of what is on it
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: damaged ({reason}); remove it, and run the same command again") from error


def _concatenated(parts: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([SCHEMA.remove(SCHEMA.get_field_index("audio")).empty_table(), *parts])
