"""The order of an epoch: every row once, within the budget, another each epoch, corpora and lengths spread evenly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import order


def rows(corpora: dict[str, list[float]], shard: int = 64) -> pa.Table:
    """Utterances by corpus, of these seconds, in shards of so many."""
    names = [(name, n) for name, seconds in corpora.items() for n in range(len(seconds))]
    return pa.table(
        {
            "corpus": pa.array([name for name, _ in names], pa.string()),
            "shard": pa.array([f"{name}/{n // shard}" for name, n in names], pa.string()).dictionary_encode(),
            "row": pa.array([n % shard for _, n in names], pa.int32()),
            "num_samples": pa.array(
                [int(s * SAMPLING_RATE) for seconds in corpora.values() for s in seconds], pa.int32()
            ),
        }
    )


def sizes(seed: int = 0) -> dict[str, list[float]]:
    """Three corpora in their real sizes, of lengths such as theirs."""
    rng = np.random.default_rng(seed)
    about = {"crema_d": (7442, 2.5, 0.5), "ravdess": (1440, 3.7, 0.34), "tess": (2800, 2.1, 0.3)}
    return {name: np.clip(rng.normal(mean, sd, n), 1, 6).tolist() for name, (n, mean, sd) in about.items()}


def flat(windows: list[order.Window]) -> list[tuple[int, ...]]:
    return [tuple(batch.tolist()) for window in windows for batch in window]


SECONDS = st.lists(st.floats(0.1, 9.0), max_size=40)
SEEDS = st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(corpora=st.lists(SECONDS, max_size=3), shard=st.integers(1, 9), budget=st.floats(0.5, 30.0), seed=SEEDS)
@pytest.mark.parametrize(("piece", "window"), [(order.PIECE, order.WINDOW), (3, 10)])
def test_every_row_comes_once_and_the_budget_holds(corpora, shard, budget, seed, piece, window):
    table = rows({str(n): seconds for n, seconds in enumerate(corpora)}, shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PIECE", piece)
        patch.setattr(order, "WINDOW", window)
        windows = order.epoch(table, budget, seed)
        assert flat(windows) == flat(order.epoch(table, budget, seed))
    batches = flat(windows)
    assert sorted(row for batch in batches for row in batch) == list(range(table.num_rows))
    samples = table["num_samples"].to_numpy()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * samples[list(batch)].max() <= budget * SAMPLING_RATE
    if table.num_rows > 2 * window:
        assert len(windows) > 1
        assert max(sum(map(len, own)) for own in windows) <= 2 * window + piece


@pytest.mark.parametrize("utterances", [60, 1500, 6000])
def test_every_epoch_is_another_one_in_order_and_in_company(utterances):
    """One window as well as several; utterances of one length too."""
    lengths = np.random.default_rng(0).uniform(1, 5, utterances).tolist()
    for seconds in (lengths, [2.0] * utterances):
        table = rows({"one": seconds})
        epochs = [flat(order.epoch(table, 20.0, seed)) for seed in ((0, 1), (0, 2), (1, 1))]
        for n, one in enumerate(epochs):
            for other in epochs[n + 1 :]:
                assert one != other
                shared = set(map(frozenset, one)) & set(map(frozenset, other))
                # Of a few utterances of very different lengths the neighbours are often the same.
                assert len(shared) < len(one) * (0.25 if utterances > 60 else 1)
                same = [mine == theirs for mine, theirs in zip(one, other, strict=False)]
                assert np.mean(same) < 0.5


def test_a_large_corpus_meets_other_windows_each_epoch():
    """Windows once were the files in their order: the same utterances, at the same time, every epoch."""
    table = rows({"one": [2.0] * 6000})
    firsts = [frozenset(np.concatenate(order.epoch(table, 60.0, (0, epoch))[0]).tolist()) for epoch in range(4)]
    for n, one in enumerate(firsts):
        for other in firsts[n + 1 :]:
            assert len(one & other) < 0.7 * len(one)


@pytest.mark.parametrize("budget", [10.0, 60.0])
def test_every_tenth_of_an_epoch_holds_each_corpus_by_its_share(budget):
    corpora = sizes()
    table = rows(corpora)
    corpus_N = np.array(table["corpus"].to_pylist())
    for epoch in range(5):
        sequence = np.concatenate([batch for window in order.epoch(table, budget, (0, epoch)) for batch in window])
        for tenth in np.array_split(corpus_N[sequence], 10):
            for name, seconds in corpora.items():
                assert np.mean(tenth == name) == pytest.approx(len(seconds) / table.num_rows, abs=0.07)


def test_any_run_of_batches_spans_all_lengths():
    table = rows({"one": np.random.default_rng(0).uniform(1, 9, 2000).tolist()})
    samples = table["num_samples"].to_numpy()
    (window,) = order.epoch(table, 60.0, (0, 1))
    middle = np.median(samples)
    for first in range(0, len(window) - 30, 10):
        run = np.concatenate(window[first : first + 30])
        assert 0.35 < np.mean(samples[run] > middle) < 0.65


def test_for_evaluation_shorter_comes_first_and_nothing_is_random():
    table = rows({"one": np.random.default_rng(0).uniform(1, 9, 300).tolist()})
    lengths = table["num_samples"].to_numpy()[np.concatenate(order.epoch(table, 20.0, None)[0])]
    assert lengths.tolist() == sorted(table["num_samples"].to_pylist())


def test_little_of_a_batch_is_padding():
    table = rows({"one": np.random.default_rng(0).uniform(1, 10, 1500).tolist()})
    samples = table["num_samples"].to_numpy()
    batches = [batch for window in order.epoch(table, 60.0, (0, 1)) for batch in window]
    padded = sum(len(batch) * samples[batch].max() for batch in batches)
    assert samples.sum() / padded > 0.90


@given(batches=st.integers(0, 60), accumulate=st.integers(1, 9), size=st.integers(1, 5))
def test_the_processes_share_every_batch_and_meet_in_every_step(batches, accumulate, size):
    of_ranks = [order.steps(batches, accumulate, rank, size) for rank in range(size)]
    assert {len(taken) for taken in of_ranks} == {-(-batches // (accumulate * size))}
    assert [n for step in of_ranks[0] for n in step.every] == list(range(batches))
    sizes_of_steps = {len(step.every) for step in of_ranks[0]}
    assert max(sizes_of_steps, default=0) - min(sizes_of_steps, default=0) <= 1, "no small one at the end"
    for together in zip(*of_ranks, strict=True):
        assert len({step.every for step in together}) == 1
        own = sorted(number for step in together for number in step.own)
        assert own == list(together[0].every)
        assert all(len(step.read) >= 1 and set(step.read) <= set(step.every) for step in together)
        assert all(len(step.own) <= accumulate for step in together)
        assert all(step.read == step.own for step in together if step.own)
    assert sorted(n for taken in of_ranks for step in taken for n in step.own) == list(range(batches))


@given(batches=st.integers(1, 60), accumulate=st.integers(1, 4), size=st.sampled_from([2, 4]))
def test_a_step_holds_the_same_whoever_takes_it(batches, accumulate, size):
    """As many batches a step, on one process or on several."""
    alone = order.steps(batches, accumulate * size)
    assert [step.every for step in alone] == [step.every for step in order.steps(batches, accumulate, 1, size)]
