"""Recordings without labels are train and nothing else, and change nothing of the fold of the others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ser_ray.config import Audio, Distil, Experiment
from ser_ray.protocols.task import Task, fold_path, load_task, write_fold
from ser_ray.protocols.unlabelled import WORD
from ser_ray.schema import UserError
from ser_ray.speech import shards

EMOTIONS = ("happy", "sad")


def shard_dir(directory, corpus, speakers, emotions):
    rows = [
        dict.fromkeys(shards.SCHEMA.names)
        | {"utterance_id": f"{corpus}/{speaker}-{emotion}", "corpus": corpus, "speaker": f"{corpus}/{speaker}"}
        | {"emotion": emotion, "path": "x.wav", "duration": 1.0, "num_samples": 1}
        | {"audio_sha256": f"{corpus}{speaker}{emotion}", "audio": b"ab"}
        for speaker in range(speakers)
        for emotion in emotions
    ]
    path = directory / corpus
    shards.write_shard(pa.Table.from_pylist(rows, schema=shards.SCHEMA), path / "one.parquet")
    shards.write_manifest(path, corpus, ["one.parquet"], [], Audio())
    return path


@pytest.fixture
def shard_dirs(tmp_path):
    return [shard_dir(tmp_path, "mine", 6, EMOTIONS), shard_dir(tmp_path, "calls", 3, (WORD,))]


def described(answers=None, **distil):
    content = {"name": "x", "corpora": {"mine": "m.csv", "calls": "c.csv"}, "emotions": EMOTIONS, "backbone": "b"}
    protocol = {"scheme": "speaker_kfold", "folds": 3}
    settings = {"answers": str(answers), "unlabelled": ["calls"]} | distil if answers else {}
    return Experiment.model_validate(content | {"protocol": protocol, "distil": settings})


def answered(path, rows):
    columns = {f"p_{emotion}": [row[k] for _, row in rows] for k, emotion in enumerate(EMOTIONS)}
    pq.write_table(pa.table({"utterance_id": [name for name, _ in rows]} | columns), path)
    return path


ANSWERS = [(f"calls/{n}-{WORD}", row) for n, row in enumerate([(0.9, 0.1), (0.2, 0.8), (0.4, 0.6)])]


def test_what_has_no_label_is_train_with_the_teachers_most_probable_emotion(shard_dirs, tmp_path):
    plain = load_task(described(), shard_dirs[:1])
    task = load_task(described(answered(tmp_path / "answers.parquet", ANSWERS)), shard_dirs)
    assert "calls" not in set(plain.index["corpus"].to_pylist())
    for split in ("train", "dev", "test"):
        own = {i: label for i, label in task.labels(split).items() if not i.startswith("calls/")}
        assert own == plain.labels(split)
    more = {i: label for i, label in task.labels("train").items() if i.startswith("calls/")}
    assert more == {f"calls/0-{WORD}": 0, f"calls/1-{WORD}": 1, f"calls/2-{WORD}": 1}
    rows = task.rows("train").to_pylist()
    assert [row["emotion"] for row in rows if row["corpus"] == "calls"] == ["happy", "sad", "sad"]
    assert "3 utterances without labels in train" in task.fold.description
    assert not task.leaky


def test_the_fold_is_written_and_read_and_has_a_file_of_its_own(shard_dirs, tmp_path):
    experiment = described(answered(tmp_path / "answers.parquet", ANSWERS))
    path = write_fold(experiment, shard_dirs, tmp_path / "folds")
    read = Task.read(path)
    assert read.labels("train") == load_task(experiment, shard_dirs).labels("train")
    assert np.all(np.diff(read.index["shard"].combine_chunks().indices.to_numpy()) >= 0), "in the order of the files"
    assert path != fold_path(described(), shard_dirs, tmp_path / "folds")


def test_a_corpus_without_labels_is_not_used_where_nobody_answers_it(shard_dirs):
    task = load_task(described(), shard_dirs)
    assert set(task.index["corpus"].to_pylist()) == {"mine"}


@pytest.mark.parametrize(
    ("rows", "said"), [(ANSWERS[:2], "no answer to 1 utterances, such as calls/2"), (None, "is missing")]
)
def test_answers_that_lack_something_are_an_error_in_one_line(shard_dirs, tmp_path, rows, said):
    path = tmp_path / "answers.parquet"
    if rows:
        answered(path, rows)
    with pytest.raises(UserError, match=said):
        load_task(described(path), shard_dirs)


def test_a_corpus_without_labels_needs_answers():
    with pytest.raises(ValueError, match=r"it needs distil\.answers"):
        Distil(unlabelled=("calls",))
