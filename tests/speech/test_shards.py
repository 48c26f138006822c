"""The Parquet format: what is written is read, and a directory without its manifest is nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ser_ray.config import Audio
from ser_ray.disk import write_json
from ser_ray.schema import Rejected, UserError
from ser_ray.speech import shards


def rows(ids: list[str], corpus: str = "ravdess") -> pa.Table:
    audio = [np.arange(n + 1, dtype="<i2").tobytes() for n, _ in enumerate(ids)]
    return pa.Table.from_pylist(
        [
            {
                "utterance_id": f"{corpus}/{key}",
                "corpus": corpus,
                "speaker": f"{corpus}/1",
                "emotion": "sad",
                "path": f"{key}.wav",
                "duration": 1.5,
                "num_samples": len(samples) // 2,
                "audio_sha256": hashlib.sha256(samples).hexdigest(),
                "audio": samples,
            }
            for key, samples in zip(ids, audio, strict=True)
        ],
        schema=shards.SCHEMA,
    )


@pytest.fixture
def directory(tmp_path):
    shards.write_shard(rows(["c", "a"]), tmp_path / "one.parquet")
    shards.write_shard(rows(["b"]), tmp_path / "two.parquet")
    shards.write_shard(shards.SCHEMA.empty_table(), tmp_path / "three.parquet")
    rejected = [Rejected("z.wav", "silent"), Rejected("y.wav", "empty")]
    shards.write_manifest(tmp_path, "ravdess", ["one.parquet", "two.parquet", "three.parquet"], rejected, Audio())
    return tmp_path


def test_shards_are_read_as_written(directory):
    tables = list(shards.read_tables([directory]))
    assert [table.num_rows for table in tables] == [2, 1, 0]
    assert tables[0].equals(rows(["c", "a"]))
    assert all(table.schema.equals(shards.SCHEMA) for table in tables)


def test_the_index_says_where_the_audio_is(directory):
    index = shards.read_index([directory])
    assert index.column_names == [*shards.INDEX_COLUMNS, "shard", "row"]
    assert index["utterance_id"].to_pylist() == ["ravdess/c", "ravdess/a", "ravdess/b"]
    assert index["row"].to_pylist() == [0, 1, 0]
    for row in index.to_pylist():
        (found,) = shards.read_rows(Path(row["shard"]), np.array([row["row"]]), ["utterance_id", "audio"]).to_pylist()
        assert found["utterance_id"] == row["utterance_id"]
        assert hashlib.sha256(found["audio"]).hexdigest() == row["audio_sha256"]


def test_rows_come_in_groups_that_can_be_read_alone(tmp_path):
    shards.write_shard(rows([f"{n:03d}" for n in range(600)]), tmp_path / "large.parquet")
    file = pq.ParquetFile(tmp_path / "large.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [256, 256, 88]


def test_the_index_of_two_corpora_is_one(directory, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shards.write_shard(rows(["a"], "emodb"), other / "one.parquet")
    shards.write_manifest(other, "emodb", ["one.parquet"], [], Audio())
    assert shards.read_index([directory, other])["corpus"].to_pylist() == [*["ravdess"] * 3, "emodb"]


def test_audio_is_uncompressed_and_the_rest_is_zstd(directory):
    group = pq.ParquetFile(directory / "one.parquet").metadata.row_group(0)
    compression = {group.column(n).path_in_schema: group.column(n).compression for n in range(group.num_columns)}
    assert compression.pop("audio") == "UNCOMPRESSED"
    assert set(compression.values()) == {"ZSTD"}


def test_the_manifest_tells_what_there_is(directory):
    manifest = shards.read_manifest(directory)
    assert (manifest["utterances"], manifest["speakers"], manifest["emotions"]) == (3, 1, {"sad": 3})
    assert manifest["hours"] == pytest.approx(4.5 / 3600)
    assert manifest["rejected"] == [{"path": "y.wav", "reason": "empty"}, {"path": "z.wav", "reason": "silent"}]
    assert manifest["audio"] == Audio().model_dump()


def test_the_content_digest_follows_content_not_files(directory, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shards.write_shard(pa.concat_tables([rows(["b"]), rows(["c", "a"])]), other / "all.parquet")
    same = shards.write_manifest(other, "ravdess", ["all.parquet"], [], Audio())["content_sha256"]
    assert same == shards.read_manifest(directory)["content_sha256"]
    shards.write_shard(rows(["b", "c", "a"]), other / "all.parquet")  # a and c get other audio
    assert shards.write_manifest(other, "ravdess", ["all.parquet"], [], Audio())["content_sha256"] != same


def test_without_a_manifest_there_is_nothing(directory):
    (directory / "manifest.json").unlink()
    assert not shards.is_whole(directory)
    for read in (shards.read_manifest, shards.shard_paths, lambda d: shards.read_index([d])):
        with pytest.raises(UserError, match="run ser-ray prepare"):
            read(directory)


def test_another_format_is_refused(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    write_json(directory / "manifest.json", manifest | {"format": 0})
    with pytest.raises(UserError, match="format 0"):
        shards.read_manifest(directory)


def test_a_row_without_an_emotion_is_not_written(tmp_path):
    column = shards.SCHEMA.get_field_index("emotion")
    table = rows(["a"]).cast(pa.schema([field.with_nullable(True) for field in shards.SCHEMA]))
    table = table.set_column(column, "emotion", pa.array([None], pa.string()))
    with pytest.raises(ValueError, match="emotion"):
        shards.write_shard(table, tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
