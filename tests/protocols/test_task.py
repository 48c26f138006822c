"""A task holds the utterances of its fold, and only those, under the experiment's labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ser_ray.config import Audio, Experiment
from ser_ray.protocols.leakage import audit
from ser_ray.protocols.task import COLUMNS, Task, fold_path, load_task, write_fold
from ser_ray.speech import shards


def shard_dir(directory: Path, corpus: str, emotions: tuple[str, ...], speakers: int = 4) -> Path:
    rows = [
        {
            "utterance_id": f"{corpus}/{speaker}-{emotion}",
            "corpus": corpus,
            "speaker": f"{corpus}/{speaker}",
            "emotion": emotion,
            "path": f"{speaker}-{emotion}.wav",
            "duration": 1.0 + speaker,
            "num_samples": 1,
            "split": ("train", "dev", "test", "train")[speaker % 4],
            "perceived": "neutral" if emotion == "sad" and speaker % 2 else None,
            "audio_sha256": f"{corpus}{speaker}{emotion}",
            "audio": b"ab",
        }
        for speaker in range(speakers)
        for emotion in emotions
    ]
    path = directory / corpus
    shards.write_shard(pa.Table.from_pylist(rows, schema=shards.SCHEMA), path / "one.parquet")
    shards.write_manifest(path, corpus, ["one.parquet"], [], Audio())
    return path


@pytest.fixture
def shard_dirs(tmp_path) -> list[Path]:
    return [
        shard_dir(tmp_path, "ravdess", ("happy", "neutral", "sad")),
        shard_dir(tmp_path, "emodb", ("neutral", "sad", "boredom")),
        shard_dir(tmp_path, "tess", ("happy", "neutral", "sad"), speakers=2),
    ]


def experiment(protocol: dict[str, Any], **changes: Any) -> Experiment:
    corpora = {"ravdess": "r", "emodb": "e", "tess": "t"}
    return Experiment.model_validate(
        {
            "name": "x",
            "corpora": corpora,
            "backbone": "b",
            "emotions": ["happy", "neutral", "sad"],
            "protocol": protocol,
            **changes,
        }
    )


def test_every_utterance_of_the_fold_is_in_one_split(shard_dirs):
    task = load_task(experiment({"folds": 3}), shard_dirs)
    found = [set(task.labels(split)) for split in ("train", "dev", "test")]
    assert sum(map(len, found)) == len(set.union(*found)) == task.index.num_rows == 4 * 3 + 4 * 2 + 2 * 3
    assert sum(sum(task.counts(split)) for split in ("train", "dev", "test")) == task.index.num_rows


def test_what_a_fold_leaves_out_is_not_in_the_task(shard_dirs):
    task = load_task(experiment({"scheme": "cross_corpus", "held_out": "emodb", "train_on": ["ravdess"]}), shard_dirs)
    assert set(task.index["corpus"].to_pylist()) == {"ravdess", "emodb"}
    assert set(task.index["utterance_id"].to_pylist()) == set(task.fold.splits)
    assert task.emotions == ("happy", "neutral", "sad")
    assert task.labels("test") == {
        f"emodb/{n}-{e}": label for n in range(4) for label, e in ((1, "neutral"), (2, "sad"))
    }
    assert task.counts("test") == (0, 4, 4)
    assert sorted(task.durations("test")) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert audit(task.index, {"fold 0": task.fold}, task.emotions)["splits"]["test"]["utterances"] == 8


def test_the_official_split_comes_from_the_shards(shard_dirs):
    task = load_task(experiment({"scheme": "official"}), shard_dirs[:1])
    assert set(task.labels("test")) == {f"ravdess/2-{emotion}" for emotion in ("happy", "neutral", "sad")}


def test_perceived_labels_come_from_the_shards(shard_dirs):
    intended, perceived = (
        load_task(experiment({"scheme": "official"}, label=label), shard_dirs[:1])
        for label in ("intended", "perceived")
    )
    assert intended.counts("dev") == (1, 1, 1)
    assert perceived.counts("dev") == (1, 2, 0)
    assert perceived.labels("dev")["ravdess/1-sad"] == 1


def test_the_fold_is_one_file_that_says_the_same(shard_dirs, tmp_path):
    made = load_task(experiment({"folds": 3}), shard_dirs)
    made.write(tmp_path / "fold.parquet")
    read = Task.read(tmp_path / "fold.parquet")
    assert read.index.column_names == list(COLUMNS)
    assert read.index.to_pylist() == made.index.select(COLUMNS).to_pylist()
    assert (read.emotions, read.fold, read.leaky) == (made.emotions, made.fold, made.leaky)
    assert read.counts("train") == made.counts("train")


def test_the_fold_says_where_the_speech_is_in_the_order_of_the_shards(shard_dirs):
    index = load_task(experiment({"folds": 3}), shard_dirs).index
    assert list(dict.fromkeys(index["shard"].to_pylist())) == [str(path / "one.parquet") for path in shard_dirs]
    for row in index.to_pylist():
        (found,) = shards.read_rows(Path(row["shard"]), np.array([row["row"]]), ["utterance_id"]).to_pylist()
        assert found["utterance_id"] == row["utterance_id"]


def test_a_fold_has_a_file_of_its_own_and_is_made_once(shard_dirs, tmp_path):
    one = experiment({"folds": 3})
    path = write_fold(one, shard_dirs, tmp_path)
    before = path.stat().st_mtime_ns
    assert write_fold(one.model_copy(update={"seed": 7}), shard_dirs, tmp_path) == path
    assert path.stat().st_mtime_ns == before
    others = [
        fold_path(experiment({"folds": 3, "fold": 1}), shard_dirs, tmp_path),
        fold_path(experiment({"folds": 3}, label="perceived"), shard_dirs, tmp_path),
        fold_path(experiment({"folds": 3}, merge={"boredom": "neutral"}), shard_dirs, tmp_path),
        fold_path(one, shard_dirs[:2], tmp_path),
    ]
    assert len({path, *others}) == 5


def test_the_file_of_a_fold_goes_by_what_a_table_of_folds_says(tmp_path):
    table = tmp_path / "folds.csv"
    table.write_text("speaker,fold\nravdess/1,0\n")
    found = experiment({"scheme": "given_folds", "given": str(table)})
    before = fold_path(found, [tmp_path], tmp_path)
    assert before == fold_path(found, [tmp_path], tmp_path)
    table.write_text("speaker,fold\nravdess/1,1\n")
    assert before != fold_path(found, [tmp_path], tmp_path)


def test_what_is_excluded_is_in_no_split_and_counted(shard_dirs, tmp_path):
    table = tmp_path / "bad.csv"
    table.write_text("utterance_id,reason\nravdess/1-sad,laughter\nemodb/0-boredom,not used here\n")
    whole, less = (experiment({"folds": 3}, exclude=exclude) for exclude in ([], str(table)))
    task = load_task(less, shard_dirs)
    assert set(load_task(whole, shard_dirs).fold.splits) - set(task.fold.splits) == {"ravdess/1-sad"}
    assert [row["reason"] for row in task.excluded.to_pylist()] == ["laughter"]
    assert task.description.endswith("; excluded utterances: 1")
    assert fold_path(whole, shard_dirs, tmp_path) != fold_path(less, shard_dirs, tmp_path)


def test_the_file_of_a_fold_goes_by_what_is_excluded_not_by_how_the_file_says_it(tmp_path):
    table = tmp_path / "bad.csv"
    table.write_text("utterance_id\nravdess/1-sad\n")
    found = experiment({"folds": 3}, exclude=str(table))
    before = fold_path(found, [tmp_path], tmp_path)
    table.write_text("reason,utterance_id\nlaughter,ravdess/1-sad\n")
    assert before == fold_path(found, [tmp_path], tmp_path)
    table.write_text("utterance_id\nravdess/2-sad\n")
    assert before != fold_path(found, [tmp_path], tmp_path)
