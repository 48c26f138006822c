"""Batches: every utterance once, within the budget, the same for the same seed, with little padding."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.speech.shards import select
from ser_ray.speech.stream import Ahead, Batch, Content, batches, expected_batches

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
@given(lengths=LENGTHS, budget=BUDGETS, seed=st.none() | st.integers(0, 9), window=st.integers(1, 70))
def test_every_utterance_comes_once_and_whole(lengths, budget, seed, window):
    seen = []
    for batch in batches([table(lengths)], budget, seed=seed, window=window):
        for row, key in enumerate(batch.utterance_ids):
            number = int(key.removeprefix("synthetic/"))
            seen.append(number)
            expected = np.zeros(batch.inputs.shape[1])
            expected[: lengths[number]] = (number + 1) / 32768
            np.testing.assert_array_equal(batch.inputs[row], expected)
            assert batch.lengths_B[row] == lengths[number]
            assert batch.labels_B[row] == number % 7
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS, seed=st.none() | st.integers(0, 9))
def test_the_budget_holds(lengths, budget, seed):
    for batch in batches([table(lengths)], budget, seed=seed):
        assert batch.inputs.shape == (len(batch), int(batch.lengths_B.max()))
        assert batch.inputs.numel() / RATE <= budget * (1 + 1e-9) or len(batch) == 1


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    order=st.randoms(),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    seed=st.none() | st.integers(0, 9),
)
def test_neither_arrival_order_nor_the_cut_into_tables_matters(lengths, order, cuts, seed):
    whole = table(lengths)
    rows = list(range(len(lengths)))
    order.shuffle(rows)
    shuffled = whole.take(pa.array(rows, pa.int64()))
    edges = [0, *sorted(min(cut, len(lengths)) for cut in cuts), len(lengths)]
    parts = [shuffled.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    assert contents(list(batches(parts, 0.5, seed=seed))) == contents(list(batches([whole], 0.5, seed=seed)))


def some_lengths(n: int) -> list[int]:
    return np.random.default_rng(0).integers(1_000, 10_000, n).tolist()


def test_seeds_change_order_and_company():
    one, other = (list(batches([table(some_lengths(300))], 5.0, seed=seed)) for seed in (1, 2))
    assert [b.utterance_ids for b in one] != [b.utterance_ids for b in other]
    assert {frozenset(b.utterance_ids) for b in one} != {frozenset(b.utterance_ids) for b in other}
    longest = [int(b.lengths_B.max()) for b in one]
    assert longest != sorted(longest)


def test_utterances_of_one_length_are_shuffled_too():
    one, other = ({b.utterance_ids for b in batches([table([800] * 50)], 0.5, seed=seed)} for seed in (1, 2))
    assert one != other


def test_without_a_seed_shorter_comes_first():
    lengths = [int(n) for b in batches([table(some_lengths(300))], 5.0, seed=None) for n in b.lengths_B]
    assert lengths == sorted(some_lengths(300))


def test_little_of_a_batch_is_padding():
    lengths = np.random.default_rng(0).uniform(1, 10, 1500) * 100  # 1-10 s at a hundredth of the rate
    found = list(batches([table(lengths.astype(int).tolist())], 0.6, seed=0))
    padded = sum(batch.inputs.numel() for batch in found)
    assert sum(int(batch.lengths_B.sum()) for batch in found) / padded > 0.90


@given(lengths=LENGTHS, budget=BUDGETS)
def test_the_expected_number_of_batches_is_that_without_jitter(lengths, budget):
    counted = len(list(batches([table(lengths)], budget, seed=None)))
    assert expected_batches([n / RATE for n in lengths], budget) == pytest.approx(counted, abs=1)


def test_select_keeps_the_labelled_rows_in_their_order():
    labels = {"synthetic/0003": 1, "synthetic/0000": 0, "other": 5}
    chosen = select(table([5, 6, 7, 8]).drop_columns("label"), labels)
    assert chosen["utterance_id"].to_pylist() == ["synthetic/0000", "synthetic/0003"]
    assert chosen["label"].to_pylist() == [0, 1]
    assert chosen["label"].type == pa.int64()
    assert chosen["num_samples"].to_pylist() == [5, 8]


def test_select_of_every_row_copies_no_audio():
    whole = table([5, 6, 7]).drop_columns("label")
    chosen = select(whole, dict.fromkeys(whole["utterance_id"].to_pylist(), 0))
    assert [b and b.address for b in chosen["audio"].chunk(0).buffers()] == [
        b and b.address for b in whole["audio"].chunk(0).buffers()
    ]


def test_select_of_none_keeps_the_columns():
    chosen = select(table([5, 6]).drop_columns("label"), {})
    assert chosen.num_rows == 0
    assert chosen.column_names[-1] == "label"


def test_no_tables_no_batches():
    assert list(batches([], 1.0, seed=0)) == []
    assert list(batches([table([])], 1.0, seed=0)) == []
    assert expected_batches([], 1.0) == 0


def test_a_batch_moves_to_a_device():
    (batch,) = batches([table([5, 6])], 1.0, seed=None)
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

    for batch in batches([table(lengths)], 0.5, seed=1, vary=vary):
        assert batch.inputs.shape[1] == int(batch.lengths_B.max())
        for row, length in enumerate(batch.lengths_B.tolist()):
            assert not batch.inputs[row, length:].any()
    assert sorted(seen) == sorted(table(lengths)["utterance_id"].to_pylist())


def test_ahead_gives_the_same_batches():
    source = lambda: batches([table(some_lengths(60))], 5.0, seed=3)  # noqa: E731
    assert contents(list(Ahead(source()))) == contents(list(source()))


def test_ahead_raises_what_its_source_raises():
    def source():
        yield from itertools.islice(batches([table(some_lengths(60))], 5.0, seed=3), 2)
        raise ValueError("no more")

    reader = Ahead(source())
    next(reader)
    next(reader)
    with pytest.raises(ValueError, match="no more"):
        next(reader)


def test_ahead_ends_its_thread_with_its_reader_and_never_runs_far_ahead():
    made = []

    def source():
        for batch in itertools.cycle(list(batches([table(some_lengths(8))], 5.0, seed=3))):
            made.append(batch)
            yield batch

    before = threading.active_count()
    reader = Ahead(source(), depth=2)
    next(reader)
    for _ in range(20):
        time.sleep(0.01)
    assert len(made) <= 1 + 2 + 1  # used, waiting, in hand
    reader.close()
    assert threading.active_count() == before


@settings(deadline=None)
@given(frames=st.lists(st.integers(1, 9), min_size=1, max_size=12), budget=BUDGETS, seed=st.none() | st.integers(0, 9))
def test_arrays_of_any_shape_are_padded_like_waveforms(frames, budget, seed):
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
    for batch in batches([pa.table(columns)], budget, seed=seed, content=content):
        for row, utterance_id in enumerate(batch.utterance_ids):
            expected = np.zeros(batch.inputs.shape[1:], np.float16)
            expected[: frames[int(utterance_id)]] = arrays[int(utterance_id)]
            np.testing.assert_array_equal(batch.inputs[row].numpy(), expected)
            assert int(batch.lengths_B[row]) == frames[int(utterance_id)]
            seen.append(int(utterance_id))
    assert sorted(seen) == list(range(len(frames)))
