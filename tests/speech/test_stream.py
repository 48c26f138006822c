"""Batches hold the utterances that they are to hold, whole and padded, whether from memory or from files."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.config import Augment
from ser_ray.speech import order, shards
from ser_ray.speech.augment import augmented
from ser_ray.speech.stream import Batch, Content, Files, Prefetcher, batches, joined, read_files, short_to_long

RATE = 16_000
LENGTHS = st.lists(st.integers(1, 4_000), max_size=60)
BUDGETS = st.floats(0.01, 2.0)


def table(lengths: list[int]) -> pa.Table:
    """Utterance n holds ``lengths[n]`` times the value n + 1, and has label n % 7."""
    return pa.table(
        {
            "utterance_id": [f"synthetic/{n:04d}" for n in range(len(lengths))],
            "num_samples": pa.array(lengths, pa.int32()),
            "label": pa.array([n % 7 for n in range(len(lengths))], pa.int64()),
            "audio": pa.array(
                [np.full(length, n + 1, "<i2").tobytes() for n, length in enumerate(lengths)], pa.large_binary()
            ),
        }
    )


def contents(found: list[Batch]) -> list[tuple]:
    return [(b.utterance_ids, b.inputs.tolist(), b.lengths_B.tolist(), b.labels_B.tolist()) for b in found]


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_every_utterance_comes_once_and_whole(lengths, budget):
    seen = []
    for batch in short_to_long(table(lengths), budget):
        assert batch.inputs.shape == (len(batch), int(batch.lengths_B.max()))
        assert batch.padded == (len(set(batch.lengths_B.tolist())) > 1)
        assert batch.inputs.numel() / RATE <= budget * (1 + 1e-9) or len(batch) == 1
        for row, key in enumerate(batch.utterance_ids):
            number = int(key.removeprefix("synthetic/"))
            seen.append(number)
            expected = np.zeros(batch.inputs.shape[1])
            expected[: lengths[number]] = (number + 1) / 32768
            np.testing.assert_array_equal(batch.inputs[row], expected)
            assert batch.lengths_B[row] == lengths[number]
            assert batch.labels_B[row] == number % 7
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_are_the_rows_that_were_asked_for():
    found = list(batches(table([5, 6, 7, 8]), [np.array([3, 0]), np.array([2])]))
    assert [b.utterance_ids for b in found] == [("synthetic/0003", "synthetic/0000"), ("synthetic/0002",)]
    assert [b.labels_B.tolist() for b in found] == [[3, 0], [2]]


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_batches_are_the_same_for_any_number_of_threads(threads):
    """Bit by bit, with every augmentation; of batches with fewer utterances than threads too."""
    lengths = np.random.default_rng(0).integers(1_000, 20_000, 30).tolist()
    every = Augment(gain_db=6, noise_snr_db=(10, 20), speed=0.1, crop_seconds=0.5)
    packed = [np.arange(7), np.array([29]), np.arange(7, 29)]
    augmentation = partial(augmented, settings=every, seed=3)
    alone, shared = (
        list(batches(table(lengths), packed, augmentation=augmentation, threads=number)) for number in (1, threads)
    )
    for one, other in zip(alone, shared, strict=True):
        assert one.utterance_ids == other.utterance_ids
        for field in ("inputs", "lengths_B", "labels_B"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_threads_share_the_utterances_of_a_batch():
    """All wait for each other: one alone would wait for ever, and the barrier would break."""
    barrier, seen = threading.Barrier(3), set()

    def meet(waveform_T, utterance_id):
        barrier.wait(timeout=60)
        seen.add(threading.get_ident())
        return waveform_T

    list(batches(table([5, 6, 7]), [np.arange(3)], augmentation=meet, threads=3))
    assert len(seen) == 3
    assert threading.get_ident() not in seen


def test_an_error_in_a_thread_is_raised_and_a_reader_that_stops_leaves_no_thread():
    def fail(waveform_T, utterance_id):
        if utterance_id == "synthetic/0005":
            raise ValueError("the sixth")
        return waveform_T

    before = set(threading.enumerate())
    packed = [np.arange(3), np.arange(3, 6)]
    made = batches(table([5] * 6), packed, augmentation=fail, threads=2)
    assert len(next(made)) == 3
    with pytest.raises(ValueError, match="the sixth"):
        next(made)
    stopped = batches(table([5] * 6), packed, threads=2)
    next(stopped)
    assert set(threading.enumerate()) - before
    stopped.close()
    assert set(threading.enumerate()) <= before


# -- from files


@pytest.fixture
def stored(tmp_path) -> pa.Table:
    """Rows of a split whose speech is in three files of several groups of rows; some of their rows are not in it."""
    lengths = np.random.default_rng(0).integers(100, 900, 1500).tolist()
    whole = table(lengths)
    columns = {"path": whole["utterance_id"], "speaker": whole["utterance_id"], "audio_sha256": whole["utterance_id"]}
    whole = whole.append_column("corpus", pa.array(["a"] * 700 + ["b"] * 800))
    for name, values in (columns | {"emotion": pa.array(["sad"] * 1500), "duration": pa.array([1.0] * 1500)}).items():
        whole = whole.append_column(name, values)
    for name in set(shards.SCHEMA.names) - set(whole.column_names):
        whole = whole.append_column(name, pa.nulls(1500))
    places = [(tmp_path / f"{name}.parquet", first, last) for name, first, last in (("b", 0, 700), ("a", 700, 1490))]
    places.append((tmp_path / "c.parquet", 1490, 1500))
    parts = []
    for path, first, last in places:
        part = whole.slice(first, last - first)
        shards.write_shard(part.select(shards.SCHEMA.names), path)
        parts += [(str(path), row) for row in range(last - first)]
    shard = pa.array([path for path, _ in parts]).dictionary_encode()
    whole = whole.append_column("shard", shard).append_column("row", pa.array([row for _, row in parts], pa.int32()))
    chosen = np.sort(np.random.default_rng(1).choice(1500, 900, replace=False))
    return whole.take(chosen)


@pytest.mark.parametrize("seed", [None, (0, 1)])
def test_files_and_memory_give_the_same_batches(stored, seed, monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 300)
    windows = order.epoch(stored, 0.5, seed)
    files = Files(stored.drop_columns("audio"))
    assert files.hold().rows.select(stored.column_names).equals(stored)
    read = [contents(list(batches(own, packed))) for own, packed in files.read(windows)]
    held = [contents(list(batches(own, packed))) for own, packed in files.hold().read(windows)]
    assert read == held
    assert len(read) > 1
    assert sorted(i for window in read for ids, *_ in window for i in ids) == sorted(stored["utterance_id"].to_pylist())


@given(chosen=st.lists(st.integers(0, 699), min_size=1, unique=True))
def test_any_rows_of_a_shard_are_read(chosen, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "numbers.parquet"
    if not path.is_file():
        ids = [f"{n}" for n in range(700)]
        rows = pa.table({name: ids if name != "audio" else pa.nulls(700) for name in ("utterance_id", "audio")})
        pq.write_table(rows, path, row_group_size=order.PIECE)
    found = shards.read_rows(path, np.array(sorted(chosen)), ["utterance_id"])
    assert found["utterance_id"].to_pylist() == [f"{n}" for n in sorted(chosen)]


def test_only_the_groups_that_hold_the_rows_are_read(stored, monkeypatch):
    asked: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups

    def watched(self, groups, **options):
        asked.append(list(groups))
        return read(self, groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    assert shards.read_rows(stored["shard"][0].as_py(), np.array([300, 310]), ["audio"]).num_rows == 2
    assert asked == [[1]]


def test_other_rows_than_those_asked_for_are_noticed(stored):
    found = list(read_files(stored, "audio"))
    with pytest.raises(AssertionError, match="not those requested"):
        joined(stored.drop_columns("audio").slice(1), found)


# -- the rest


def test_no_rows_no_batches():
    assert list(short_to_long(table([]), 1.0)) == []


def test_a_batch_moves_to_a_device():
    (batch,) = short_to_long(table([5, 6]), 1.0)
    moved = batch.to("meta")
    assert moved.utterance_ids == batch.utterance_ids
    assert {t.device.type for t in (moved.inputs, moved.lengths_B, moved.labels_B)} == {"meta"}
    assert batch.inputs.dtype == torch.float32
    assert batch.labels_B.dtype == batch.lengths_B.dtype == torch.int64


def test_variation_meets_each_utterance_once_wherever_it_is_packed():
    lengths = [800 * n for n in range(1, 9)]
    seen = []

    def vary(waveform, utterance_id):
        seen.append(utterance_id)
        return waveform[: len(waveform) // 2] * 0.5

    for batch in batches(table(lengths), [np.array([5, 0, 2]), np.array([1, 3, 4, 6, 7])], augmentation=vary):
        assert batch.inputs.shape[1] == int(batch.lengths_B.max())
        for row, length in enumerate(batch.lengths_B.tolist()):
            assert not batch.inputs[row, length:].any()
    assert sorted(seen) == sorted(table(lengths)["utterance_id"].to_pylist())


def some() -> list[Batch]:
    return list(short_to_long(table(np.random.default_rng(0).integers(1_000, 10_000, 60).tolist()), 5.0))


def test_ahead_gives_the_same_batches():
    assert contents(list(Prefetcher(some()))) == contents(some())


def test_ahead_raises_what_its_source_raises():
    def source():
        yield from itertools.islice(some(), 2)
        raise ValueError("no more")

    reader = Prefetcher(source())
    next(reader)
    next(reader)
    with pytest.raises(ValueError, match="no more"):
        next(reader)


def test_ahead_ends_its_thread_with_its_reader_and_never_runs_far_ahead():
    made = []

    def source():
        for batch in itertools.cycle(some()):
            made.append(batch)
            yield batch

    before = threading.active_count()
    reader = Prefetcher(source(), depth=2)
    next(reader)
    for _ in range(20):
        time.sleep(0.01)
    assert len(made) <= 1 + 2 + 1  # used, waiting, in hand
    reader.close()
    assert threading.active_count() == before


@settings(deadline=None)
@given(frames=st.lists(st.integers(1, 9), min_size=1, max_size=12), budget=BUDGETS)
def test_arrays_of_any_shape_are_padded_like_waveforms(frames, budget):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((n, 2, 3)).astype(np.float16) for n in frames]
    columns = {
        "utterance_id": [str(n) for n in range(len(frames))],
        "num_samples": [n * 320 for n in frames],
        "kept": pa.array([array.tobytes() for array in arrays], pa.large_binary()),
        "label": list(range(len(frames))),
    }
    content = Content("kept", lambda buffer: np.frombuffer(buffer, np.float16).reshape(-1, 2, 3))
    seen = []
    for batch in short_to_long(pa.table(columns), budget, content):
        for row, utterance_id in enumerate(batch.utterance_ids):
            expected = np.zeros(batch.inputs.shape[1:], np.float16)
            expected[: frames[int(utterance_id)]] = arrays[int(utterance_id)]
            np.testing.assert_array_equal(batch.inputs[row].numpy(), expected)
            assert int(batch.lengths_B[row]) == frames[int(utterance_id)]
            seen.append(int(utterance_id))
    assert sorted(seen) == list(range(len(frames)))
