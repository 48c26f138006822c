"""What workers are fed: the batches of the plain files, resident and streamed, shared without rest by the workers."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import ray
from rich.console import Console
from test_verbs import write_space

from ser_ray import config
from ser_ray.prepare import prepare
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import feed
from ser_ray.speech import order, shards, stream
from ser_ray.speech.cached_features import Prefix
from ser_ray.training import loop


@pytest.fixture(scope="module")
def prepared(tiny_corpus, tiny_cache, tmp_path_factory) -> tuple[Task, config.SearchSpace]:
    """The tiny corpus in several shards."""
    path = write_space(tmp_path_factory.mktemp("feed"), tiny_corpus, tiny_cache)
    space = config.load(path, ["experiment.batch_seconds=5"])
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    directory = tmp_path_factory.mktemp("small")
    names = []
    for table in shards.read_tables(shard_dirs):
        for start in range(0, table.num_rows, 7):
            names.append(f"{len(names)}.parquet")
            shards.write_shard(table.slice(start, 7), directory / names[-1])
    shards.write_manifest(directory, "ravdess", names, [], space.experiment.audio)
    return load_task(space.experiment, [directory]), space


@pytest.fixture
def small_windows(monkeypatch) -> None:
    """Several windows and several reads of each, of a few utterances."""
    monkeypatch.setattr(order, "WINDOW", 12)
    monkeypatch.setattr(feed, "PIECE", 5)


def files(task: Task, split: str) -> stream.Files:
    return stream.Files(task.rows(split))


def data(
    space: config.SearchSpace, train: stream.Source, dev: stream.Source, rank: int = 0, size: int = 1
) -> loop.Data:
    return feed.data(space.experiment, train, dev, stream.SPEECH, rank, size)


def same(one: list[stream.Batch], other: list[stream.Batch]) -> bool:
    return [b.utterance_ids for b in one] == [b.utterance_ids for b in other] and all(
        a.inputs.equal(b.inputs) and a.labels_B.equal(b.labels_B) for a, b in zip(one, other, strict=True)
    )


def ids(batches: Iterator[stream.Batch]) -> list[str]:
    return [i for batch in batches for i in batch.utterance_ids]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "small_windows")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_ray_feeds_the_batches_of_the_plain_files(prepared, resident, size):
    task, space = prepared
    loaded = feed.load_resident(task, ["train", "dev"] if resident else [], "audio")
    for rank in range(size):
        sources = [
            feed.held(task.rows(split), loaded[split].iterator())
            if resident
            else feed.Streamed(task.rows(split), "audio")
            for split in ("train", "dev")
        ]
        found = data(space, *sources, rank, size)
        expected = data(space, files(task, "train"), files(task, "dev"), rank, size)
        for epoch in (0, 1, 2):
            assert same(list(found.train(epoch)), list(expected.train(epoch)))
            assert same(list(found.dev()), list(expected.dev()))
        if not resident:
            begun = [ahead for source in sources for ahead in source.begun]
            assert len(begun) == 1, "an epoch of dev is begun that may be wanted, and none of train, which was the last"
            for source in sources:
                source.close()
            assert not any(ahead._thread.is_alive() for ahead in begun)


@pytest.mark.ray
@pytest.mark.usefixtures("full_cluster", "small_windows")
def test_files_are_streamed_on_a_cluster_without_a_free_cpu(prepared):
    """Trials may hold them all, and would wait for ever for the tasks that read."""
    task, space = prepared
    assert ray.available_resources().get("CPU", 0) < 1
    source = feed.Streamed(task.rows("train"), "audio")
    assert sorted(ids(data(space, source, files(task, "dev")).train(2))) == sorted(task.labels("train"))


@pytest.mark.usefixtures("small_windows")
def test_only_the_rows_of_a_workers_own_batches_are_asked_for(prepared):
    task, _ = prepared
    rows = task.rows("train")
    asked = []
    for rank in range(2):
        windows = feed._only(order.epoch(rows, 5.0, (0, 1)), range(rank, 10_000, 2))
        asked.append([i for t in feed.Streamed(rows, "audio")._asked(windows) for i in t["utterance_id"].to_pylist()])
    assert sorted(asked[0] + asked[1]) == sorted(rows["utterance_id"].to_pylist())
    assert min(map(len, asked)) > 0


def test_the_next_epoch_is_begun_when_this_one_is_read(prepared):
    """Before its last window is used."""
    task, _ = prepared
    rows, begun = task.rows("train"), []

    class Plain(feed.Streamed):
        def _tables(self, windows) -> Iterator[pa.Table]:
            begun.append(windows)
            for asked in self._asked(windows):
                yield feed._read(asked, "audio", None)

    windows, following = (order.epoch(rows, 5.0, (0, epoch)) for epoch in (1, 2))
    source = Plain(rows, "audio")
    read = source.read(windows, lambda: following)
    next(read)
    (ahead,) = source.begun
    assert list(read) == []
    table, packed = next(source.read(following))
    assert source.begun == []
    assert sorted(table["utterance_id"].to_pylist()) == sorted(rows["utterance_id"].to_pylist())
    assert [list(batch) for batch in packed] == [list(batch) for batch in following[0]]
    ahead.close()
    assert [id(one) for one in begun] == [id(windows), id(following)]


def test_epochs_differ_and_come_again_for_the_same_seed(prepared):
    task, space = prepared
    found = data(space, files(task, "train"), files(task, "dev"))
    one, again, two = list(found.train(1)), list(found.train(1)), list(found.train(2))
    assert same(one, again)
    assert not same(one, two)
    assert sorted(ids(two)) == sorted(task.labels("train"))


@pytest.mark.parametrize("size", [2, 3, 40])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_share_train_and_dev_without_rest(prepared, size, accumulate):
    """However many: the last step may have no batch for some, who then run the last one beside its owner."""
    task, space = prepared
    optimizer = space.experiment.optimizer.model_copy(update={"accumulate": accumulate})
    own = space.model_copy(update={"experiment": space.experiment.model_copy(update={"optimizer": optimizer})})
    parts = [data(own, files(task, "train"), files(task, "dev"), rank, size) for rank in range(size)]
    everyone = sorted(task.labels("train"))
    assert sorted(i for part in parts for i in ids(part.dev())) == sorted(task.labels("dev"))
    assert sorted(i for part in parts for i in ids(part.train(0))) == everyone
    counts_BK = parts[0].counts(1)
    assert all(np.array_equal(part.counts(1), counts_BK) for part in parts)
    assert counts_BK.sum(0).tolist() == list(task.counts("train"))
    counted = []
    for rank, part in enumerate(parts):
        batches = iter(part.train(1))
        for step in order.steps(len(counts_BK), accumulate, rank, size):
            for number in step.read:
                batch = next(batches)
                assert np.bincount(batch.labels_B, minlength=4).tolist() == counts_BK[number].tolist()
                counted += batch.utterance_ids if step.own else []
        assert next(batches, None) is None
    assert sorted(counted) == everyone


def sized(monkeypatch, train: int, dev: int) -> Task:
    """A task of which only the sizes matter: hours of speech in a row."""
    seconds = [train * 3600.0, dev * 3600.0, 10 * 3600.0]
    index = pa.table(
        {
            "utterance_id": ["a", "b", "c"],
            "split": ["train", "dev", "test"],
            "duration": seconds,
            "num_samples": pa.array([int(s * 16_000) for s in seconds], pa.int64()),
        }
    )
    monkeypatch.setattr(feed.ray, "cluster_resources", lambda: {"object_store_memory": 10e9})  # 3e9 for data: 26 hours
    return Task(("sad",), index, "", False, False)


@pytest.mark.parametrize(
    ("train", "dev", "expected"), [(20, 5, ("train", "dev")), (200, 5, ("dev",)), (200, 50, ()), (24, 5, ("dev",))]
)
def test_resident_is_what_fits(prepared, monkeypatch, train, dev, expected):
    _, space = prepared
    stays = sized(monkeypatch, train, dev)
    assert feed.resident_splits(space, stays, None) == expected


def test_resident_or_streamed_is_a_choice_too(prepared, monkeypatch):
    _, space = prepared
    stays = sized(monkeypatch, 200, 50)
    for choice, expected in (("resident", ("train", "dev")), ("streamed", ())):
        resources = space.resources.model_copy(update={"data": choice})
        assert feed.resident_splits(space.model_copy(update={"resources": resources}), stays, None) == expected


def test_what_a_frozen_prefix_kept_has_a_size_of_its_own(prepared, monkeypatch):
    _, space = prepared
    stays = sized(monkeypatch, 200, 50)
    frames = Prefix("b", "i", False, "fp32", 1, 1, 32, None)
    moments = Prefix("b", "i", False, "fp32", 1, 1, 32, "mean")
    assert feed.resident_splits(space, stays, frames) == ("train", "dev")  # 250 h x 3600 x 50 x 64 bytes: 2.9e9
    assert feed.resident_splits(space, sized(monkeypatch, 300, 50), frames) == ("dev",)
    assert feed.resident_splits(space, sized(monkeypatch, 30_000, 50), moments) == ("train", "dev")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("speaker", ["none", "center"])
def test_nothing_is_read_early_where_another_epoch_may_be_read_between(prepared, speaker):
    """With voices of speakers epoch 0 is read before every other; streamed data would be taken for it."""
    task, space = prepared
    head = space.experiment.head.model_copy(update={"speaker": speaker})
    space = space.model_copy(update={"experiment": space.experiment.model_copy(update={"head": head, "epochs": 2})})
    early = []

    class Read(stream.Files):
        def read(self, windows, following=None):
            early.append(following is not None)
            return super().read(windows, following)

    found = data(space, Read(task.rows("train")), files(task, "dev"))
    plain = data(space, files(task, "train"), files(task, "dev"))
    for epoch in (0, 1, 0, 2):
        assert same(list(found.train(epoch)), list(plain.train(epoch)))
    assert early == ([True, True, True, False] if speaker == "none" else [False] * 4)
    rows = task.rows("train")
    of_utterances = dict(zip(rows["utterance_id"].to_pylist(), rows["speaker"].to_pylist(), strict=True))
    assert found.speakers == ({} if speaker == "none" else of_utterances)
