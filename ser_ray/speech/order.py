"""The order of an epoch: which utterances form a batch, and which batch follows which.

It depends on the seed, the epoch and the utterances alone: not on the number of processes that share an epoch, the
number of tasks that read it, or whether its data are in memory or streamed. Processes take batches in turn (`steps`).

    piece    at most `PIECE` consecutive rows of one file: what is read at once
    window   consecutive pieces of about `WINDOW` utterances: what is in memory at once
    batch    utterances of a window of about the same length, within a budget of padded seconds

Batches of similar lengths reduce padding: for recordings of 1 to 10 s, half of a batch is padding in order of arrival,
and a few per cent when sorted within a window. But corpora differ in length, so an order by length is an order by
corpus. Therefore the pieces of every corpus are spread evenly over the epoch, and the batches of every length evenly
over their window: any stretch of an epoch contains each corpus in about its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from ser_ray.schema import SAMPLING_RATE

PIECE: Final = 256
"""Rows; also the size of the row groups of a shard, so that a piece can be read alone."""
WINDOW: Final = 2048
"""Utterances: 200 MB of speech, at 3 s each."""
JITTER: Final = 0.02
"""Lengths are jittered by up to this share before sorting, so that an utterance has other neighbours each epoch; costs
about as much padding (RAVDESS, 60 s a batch: 2.2 % with it, 0.9 % without, 4.7 % at 0.05)."""

Window = list[np.ndarray]
"""A window's batches, in order; each is an array of row numbers."""


def epoch(rows: pa.Table, batch_seconds: float, seed: Sequence[int] | None) -> list[Window]:
    """The windows of an epoch: every row of ``rows`` once, in batches of at most ``batch_seconds`` padded seconds.

    ``rows`` has the columns num_samples, corpus, shard (dictionary-encoded) and row, in the order of the files
    (`ser_ray.protocols.task`). An utterance that is longer than ``batch_seconds`` is a batch by itself. ``seed`` is
    the experiment's seed and the epoch's number. With None, for evaluation, nothing is random: files come in their
    order, and the batches of a window from short to long.
    """
    if rows.num_rows == 0:
        return []
    rng = None if seed is None else np.random.default_rng(seed)
    samples_N = rows["num_samples"].to_numpy().astype(np.float64)
    starts_P = _pieces(rows)
    sizes_P = np.diff(starts_P, append=rows.num_rows)
    order_P = np.arange(len(starts_P))
    if rng is not None:
        corpus_N = rows["corpus"].combine_chunks().dictionary_encode().indices.to_numpy()
        order_P = _spread(corpus_N[starts_P], sizes_P, rng)
    windows = []
    for pieces in _cut(sizes_P[order_P]):
        chosen = order_P[pieces]
        own = np.concatenate([np.arange(starts_P[p], starts_P[p] + sizes_P[p]) for p in chosen])
        packed = [own[batch] for batch in by_length(samples_N[own], batch_seconds, rng)]
        windows.append(packed if rng is None else _mixed(packed, rng))
    return windows


def by_length(samples_N: np.ndarray, batch_seconds: float, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Utterances of ``samples_N`` samples in batches of at most ``batch_seconds`` padded seconds, from short to long.

    Each batch is an array of utterance numbers. With ``rng`` the lengths are jittered before they are sorted.

    >>> [batch.tolist() for batch in by_length(np.array([48_000, 16_000, 32_000]), batch_seconds=4.0)]
    [[1, 2], [0]]
    """
    lengths = np.asarray(samples_N, np.float64)
    keys = lengths if rng is None else lengths * rng.uniform(1 - JITTER, 1 + JITTER, len(lengths))
    ordered = np.argsort(keys, kind="stable")
    budget, start, largest = batch_seconds * SAMPLING_RATE, 0, 0.0
    batches = []
    for position, length in enumerate(lengths[ordered].tolist()):
        largest = max(largest, length)
        if position > start and (position - start + 1) * largest > budget:
            batches.append(ordered[start:position])
            start, largest = position, length
    return [*batches, ordered[start:]] if len(lengths) else batches


@dataclass(frozen=True)
class Step:
    """The batches of one optimiser step, by their number in the epoch."""

    every: range
    """Of all processes."""
    own: range
    """Of this process; may be empty if a step has fewer batches than there are processes."""

    @property
    def read(self) -> Sequence[int]:
        """The batches that this process runs: its own. Gradients are summed over all processes, so a process without a
        batch runs the last one, which is another's, with weight zero."""
        return self.own or self.every[-1:]


def steps(batches: int, accumulate: int, rank: int = 0, size: int = 1) -> list[Step]:
    """The steps of an epoch of so many batches, for process ``rank`` of ``size``.

    A step is up to ``accumulate`` batches of each process. The batches are divided evenly among as few steps as
    possible, so that no small step is left at the end. All processes know the steps beforehand: none has to ask the
    others whether a batch follows, which would make it wait for its GPU, and no batch of an epoch is left out.

    >>> [(list(step.every), list(step.own)) for step in steps(5, accumulate=2, rank=1, size=2)]
    [([0, 1], [1]), ([2, 3, 4], [3])]
    """
    count = -(-batches // (accumulate * size))
    edges = [batches * number // count for number in range(count + 1)] if count else []
    return [
        Step(range(first, last), range(min(first + rank, last), last, size))
        for first, last in itertools.pairwise(edges)
    ]


# -- below: how it is done


def _pieces(rows: pa.Table) -> np.ndarray:
    """The first row of every piece."""
    shard_N = rows["shard"].combine_chunks().indices.to_numpy()
    piece_N = rows["row"].to_numpy() // PIECE
    begins_N = (np.diff(shard_N, prepend=-1) != 0) | (np.diff(piece_N, prepend=-1) != 0)
    return np.flatnonzero(begins_N)


def _spread(group_M: np.ndarray, size_M: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An order of M items in which every group is spread evenly, its members in random order."""
    place_M = np.empty(len(group_M))
    for group in np.unique(group_M):
        own = rng.permutation(np.flatnonzero(group_M == group))
        ends = np.cumsum(size_M[own])
        place_M[own] = (ends - rng.uniform() * size_M[own]) / ends[-1]
    return np.argsort(place_M, kind="stable")


def _cut(size_P: np.ndarray) -> list[slice]:
    """Runs of pieces, of about `WINDOW` rows and about equal size."""
    ends_P = np.cumsum(size_P)
    number = max(1, round(ends_P[-1] / WINDOW))
    cuts = [0, *np.searchsorted(ends_P, ends_P[-1] * np.arange(1, number) / number), len(size_P)]
    return [slice(first, last) for first, last in itertools.pairwise(cuts) if first < last]


def _mixed(batches: Window, rng: np.random.Generator) -> Window:
    """Batches from short to long -> an order in which any run of them spans all lengths."""
    strata = round(len(batches) ** 0.5)
    group = np.arange(len(batches)) * strata // len(batches)
    return [batches[i] for i in _spread(group, np.array([len(batch) for batch in batches]), rng)]
