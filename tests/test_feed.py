"""What workers are fed: every row once, dealt evenly, and the same batches however they are read."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_verbs import write_space

from ser_ray import config, feed
from ser_ray.prepare import prepare
from ser_ray.protocols.task import Task, load_task
from ser_ray.speech import shards, stream


@pytest.fixture(scope="module")
def prepared(tiny_corpus, tiny_cache, tmp_path_factory) -> tuple[Task, list[Path], config.SearchSpace]:
    """The tiny corpus in several shards."""
    space = config.load(write_space(tmp_path_factory.mktemp("feed"), tiny_corpus, tiny_cache))
    shard_dirs = prepare(space, use_ray=False, console=Console(file=io.StringIO()))
    task = load_task(space.experiment, shard_dirs)
    directory = tmp_path_factory.mktemp("small")
    paths = []
    for table in shards.read_tables(shard_dirs):
        for start in range(0, table.num_rows, 7):
            paths.append(directory / f"{len(paths)}.parquet")
            shards.write_shard(table.slice(start, 7), paths[-1])
    return task, paths, space


def plain(task: Task, paths: list[Path], split: str, seed: int | None) -> list[stream.Batch]:
    tables = (shards.select(table, task.labels(split)) for table in shards.read_paths(paths))
    return list(stream.batches(tables, 5.0, seed=seed))


def same(one: list[stream.Batch], other: list[stream.Batch]) -> bool:
    return [b.utterance_ids for b in one] == [b.utterance_ids for b in other] and all(
        a.inputs.equal(b.inputs) and a.labels_B.equal(b.labels_B) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("resident", [True, False])
def test_ray_feeds_the_batches_of_the_plain_files(prepared, resident):
    task, paths, _ = prepared
    datasets = feed.load_datasets(task, paths, "audio", 1, resident)
    for name, split in (("train_0", "train"), ("dev", "dev")):
        read = feed.Tables(datasets[name].iterator(), resident)
        for seed in (0, 1):
            batches = list(stream.batches(read(), 5.0, seed=seed))
            assert same(batches, plain(task, paths, split, seed))
        read.close()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_rows_come_in_the_order_of_the_files(prepared):
    """So that windows hold the same utterances however many tasks read."""
    task, paths, _ = prepared
    labels = task.labels("train")
    expected = [i for path in paths for i in shards.read_ids(path) if i in labels]
    for _ in range(2):
        dataset = feed.load_datasets(task, paths, "audio", 1, False)["train_0"]
        read = feed.Tables(dataset.iterator(), False)
        assert [i for table in read() for i in table["utterance_id"].to_pylist()] == expected
        read.close()


def test_resident_tables_are_asked_for_once_and_streamed_ones_one_epoch_ahead():
    class Source:
        asked = 0

        def iter_batches(self, **settings):
            Source.asked += 1
            return iter(["a", "b"])

    for resident, times in ((True, 1), (False, 4)):
        Source.asked = 0
        read = feed.Tables(Source(), resident)
        assert [list(read()) for _ in range(3)] == [["a", "b"]] * 3
        assert Source.asked == times
        begun = list(read.begun)
        read.close()
        assert not any(ahead._thread.is_alive() for ahead in begun)
        assert len(begun) == (0 if resident else 1)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=60), workers=st.integers(1, 5))
def test_every_row_is_dealt_once_and_evenly(sizes, workers):
    ids = {Path(f"{n}.parquet"): [f"{n}-{k}" for k in range(size)] for n, size in enumerate(sizes)}
    labels = {i: 0 for rows in ids.values() for i in rows}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "read_ids", ids.__getitem__)
        parts = feed._dealt(list(ids), labels, workers)
        assert parts == feed._dealt(list(ids), labels, workers)
    assert len(parts) == workers
    dealt = [i for _, own in parts for i in own]
    assert sorted(dealt) == sorted(labels)
    for paths, own in parts:
        assert set(own) <= {i for path in paths for i in ids[path]}
    counts = [len(own) for _, own in parts]
    whole_shards = workers > 1 and len(ids) >= feed.SHARDS_PER_WORKER * workers
    assert max(counts) - min(counts) <= (max(sizes) if whole_shards else 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_are_fed_all_of_train_and_dev_twice(prepared):
    task, paths, _ = prepared
    datasets = feed.load_datasets(task, paths, "audio", 2, True)
    parts = [
        [
            i
            for table in feed.Tables(datasets[f"train_{rank}"].iterator(), True)()
            for i in table["utterance_id"].to_pylist()
        ]
        for rank in range(2)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(task.labels("train"))
    assert datasets["dev"].count() == len(task.labels("dev"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_resident_or_streamed_is_a_choice_or_by_size(prepared, tmp_path):
    _, paths, space = prepared

    def stays(data: str, paths: list[Path]) -> bool:
        resources = space.resources.model_copy(update={"data": data})
        return feed.stays_resident(space.model_copy(update={"resources": resources}), paths)

    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**41)  # a hole, 2 TiB
    assert stays("auto", paths)
    assert not stays("auto", [large])
    assert stays("resident", [large])
    assert not stays("streamed", paths)


def test_epochs_differ_and_come_again_for_the_same_seed(prepared):
    task, paths, space = prepared

    def tables(split: str):
        return lambda: (shards.select(t, task.labels(split)) for t in shards.read_paths(paths))

    data = feed.data(space.experiment, task, tables("train"), tables("dev"), stream.SPEECH)
    one, again, two = list(data.train(1)), list(data.train(1)), list(data.train(2))
    assert same(one, again)
    assert not same(one, two)
    assert sorted(i for b in two for i in b.utterance_ids) == sorted(task.labels("train"))
    assert data.train_counts == task.counts("train")
    parts = [
        feed.data(space.experiment, task, tables("train"), tables("dev"), stream.SPEECH, rank, 2).dev()
        for rank in (0, 1)
    ]
    dealt = [i for part in parts for batch in part for i in batch.utterance_ids]
    assert sorted(dealt) == sorted(task.labels("dev"))
