"""The data loader of a trial's workers: batches of a fold's rows, from the object store or streamed by Ray Data.

Data that fit the object store stay there between epochs and are read without a copy, in any order. Other data are
streamed from the files window by window, and the next windows are prefetched; a worker receives only the rows of its
own batches. Either way the batches are those of `ser_ray.speech.order`, for any number of workers and readers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import ray
import ray.data

from ser_ray.config import Experiment, SearchSpace
from ser_ray.protocols.task import Task
from ser_ray.speech.cached_features import Prefix
from ser_ray.speech.order import PIECE, Window, epoch, steps

# torch takes seconds to import, and many processes only start and watch a trial.
if TYPE_CHECKING:
    from ser_ray.speech.stream import Batch, Content, Prefetcher, Source
    from ser_ray.training import loop
    from ser_ray.training.teacher import Teacher

RESIDENT_SHARE: Final = 0.3
"""Data up to this share of the object store stay there between epochs; more are streamed from the files."""
LOCAL_SHARE: Final = 0.1
"""Without Ray: the same as a share of the machine's memory, of which Ray's object store takes about a third."""
PREFETCHED_TABLES: Final = 4
"""Tables of up to `PIECE` rows that are prefetched for the next window or epoch: 100 MB of speech."""
READERS: Final = 2
"""Concurrent tasks that read files for one worker. They wait for disks and request no CPU: on a cluster whose CPUs all
work on trials, tasks that request one would not run."""


def resident_splits(space: SearchSpace, task: Task, prefix: Prefix | None) -> tuple[str, ...]:
    """Which of train and dev stay in memory between epochs, as `resources.data` says: both, dev, or none.

    ``prefix``: the cached features that a trial reads; None if it reads waveforms.
    """
    if space.resources.data != "auto":
        return ("train", "dev") if space.resources.data == "resident" else ()
    if space.resources.workers:
        room = RESIDENT_SHARE * ray.cluster_resources().get("object_store_memory", 0)
    else:
        room = LOCAL_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    train, dev = (_bytes(task.rows(split), prefix) for split in ("train", "dev"))
    return ("train", "dev") if train + dev <= room else ("dev",) if dev <= room else ()


def load_resident(
    task: Task, splits: Iterable[str], column: str, cached: Path | None = None
) -> dict[str, ray.data.Dataset]:
    """The ``splits`` as Ray datasets in the object store, in the order of the fold, for every worker.

    They are read in this process: pyarrow reads an hour of speech in milliseconds; Ray Data would have to start tasks.
    """
    from ser_ray.speech import stream

    return {split: ray.data.from_blocks(list(stream.read_files(task.rows(split), column, cached))) for split in splits}


def held(rows: pa.Table, dataset: Any) -> Source:
    """A split that `load_resident` has put into the object store, read without a copy."""
    from ser_ray.speech import stream

    return stream.Held(stream.joined(rows, dataset.iter_batches(batch_size=None, batch_format="pyarrow")))


class Streamed:
    """A split that Ray Data reads from its files, one window after another.

    Reading of the following windows starts as soon as the current ones have been read: Ray Data takes seconds to start,
    and the last window is still to be trained on. `close` ends reading that was started and is no longer needed.
    """

    def __init__(self, rows: pa.Table, column: str, cached: Path | None = None) -> None:
        self.rows, self.column, self.cached = rows, column, cached
        self.begun: list[Prefetcher[pa.Table]] = []

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """See `ser_ray.speech.stream.Source`."""
        from ser_ray.speech import stream

        tables = self.begun.pop() if self.begun else self._begin(windows)
        for number, window in enumerate(windows, start=1):
            own = stream.rows_of(window)
            table = stream.joined(self.rows.take(own), _gathered(tables, len(own)))
            if number == len(windows) and following is not None:
                self.begun.append(self._begin(following()))
            yield table, stream.within(window, own)

    def close(self) -> None:
        """End the reading ahead: no windows follow."""
        while self.begun:
            self.begun.pop().close()

    def _begin(self, windows: Sequence[Window]) -> Prefetcher[pa.Table]:
        from ser_ray.speech.stream import Prefetcher

        return Prefetcher(self._tables(windows), PREFETCHED_TABLES)

    def _tables(self, windows: Sequence[Window]) -> Iterator[pa.Table]:
        asked = list(self._asked(windows))
        if not asked:
            return
        # Not from_arrow, which counts rows in a task that requests a CPU.
        dataset = ray.data.from_blocks(asked).map_batches(
            _read,
            fn_args=(self.column, self.cached),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=READERS,
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)

    def _asked(self, windows: Sequence[Window]) -> Iterator[pa.Table]:
        """The rows to read, one table per task."""
        from ser_ray.speech import stream

        for window in windows:
            chosen = self.rows.select(["utterance_id", "shard", "row"]).take(stream.rows_of(window))
            # As plain strings: dictionary-encoded, every block would hold the names of all files.
            chosen = chosen.set_column(1, "shard", chosen["shard"].cast(pa.string())).combine_chunks()
            for first in range(0, chosen.num_rows, PIECE):
                yield chosen.slice(first, PIECE)


def data(
    experiment: Experiment,
    train: Source,
    dev: Source,
    content: Content,
    rank: int = 0,
    size: int = 1,
    threads: int = 1,
) -> loop.Data:
    """Batches for one of ``size`` processes: those of its optimiser steps, and every ``size``-th batch of dev.

    A thread prepares them while the previous step runs; ``threads`` decode and augment the utterances of a batch for
    it. On a machine with a GPU batches are in page-locked memory.
    """
    import torch

    from ser_ray.speech import augment, stream
    from ser_ray.training import loop

    label_N, pin = train.rows["label"].to_numpy(), torch.cuda.is_available()
    made = partial(stream.batches, content=content, threads=threads)

    def read(
        source: Source, order: list[Window], following: Callable[[], list[Window]] | None, **how: Any
    ) -> Iterator[Batch]:
        tables = source.read(order, following)
        batches = (batch for table, packed in tables for batch in made(table, packed, **how))
        return stream.Prefetcher(batch.pin() if pin else batch for batch in batches)

    # This epoch and the next, and epoch 0, which is read between them for the voices of speakers.
    @lru_cache(maxsize=3)
    def ordered(number: int) -> list[Window]:
        return epoch(train.rows, experiment.batch_seconds, (experiment.seed, number))

    def counts(number: int) -> np.ndarray:
        of_batches = [np.bincount(label_N[b], minlength=len(experiment.emotions)) for w in ordered(number) for b in w]
        return np.stack(of_batches)

    def share(number: int) -> list[Window]:
        windows = ordered(number)
        batches = sum(map(len, windows))
        taken = steps(batches, experiment.optimizer.accumulate, rank, size)
        # Epoch 0 is the linear probe's, which takes no optimiser steps.
        return _only(windows, [b for step in taken for b in step.read] if number else range(rank, batches, size))

    def train_batches(number: int) -> Iterator[Batch]:
        seed = experiment.seed * 10_000 + number
        # The probe is fitted without augmentation, and recordings that a speaker is known by have none.
        augmentation = partial(augment.augmented, settings=experiment.augment, seed=seed) if number else None
        # With voices of speakers epoch 0 is read before every other, so what follows is not known here.
        early = experiment.head.speaker == "none" and number < experiment.epochs
        following = partial(share, number + 1) if early else None
        return read(train, share(number), following, augmentation=augmentation)

    dev_order = epoch(dev.rows, experiment.batch_seconds, None)
    own_dev = _only(dev_order, range(rank, sum(map(len, dev_order)), size))

    speakers = _by_id(train.rows, "speaker") if experiment.head.speaker != "none" else {}
    taught_by = _teacher(experiment, train.rows)
    return loop.Data(train_batches, lambda: read(dev, own_dev, lambda: own_dev), counts, speakers, taught_by)


# -- below: how it is done


def _teacher(experiment: Experiment, rows: pa.Table) -> Teacher | None:
    """What a student is trained on beside its labels; None without `config.Distil.answers`."""
    from ser_ray.training.teacher import Teacher

    return Teacher.read(experiment, _by_id(rows, "corpus")) if experiment.distil.answers else None


def _by_id(rows: pa.Table, column: str) -> dict[str, str]:
    return dict(zip(rows["utterance_id"].to_pylist(), rows[column].to_pylist(), strict=True))


def _bytes(rows: pa.Table, prefix: Prefix | None) -> float:
    if prefix is None:
        return 2.0 * np.sum(rows["num_samples"].to_numpy(), dtype=np.float64)
    return 1e9 * prefix.gigabytes(np.sum(rows["duration"].to_numpy()), rows.num_rows)


def _only(windows: Sequence[Window], numbers: Iterable[int]) -> list[Window]:
    """The windows with only the batches of these numbers, counted over all windows; empty windows are left out."""
    wanted, chosen, first = set(numbers), [], 0
    for window in windows:
        chosen.append([batch for number, batch in enumerate(window, start=first) if number in wanted])
        first += len(window)
    return [window for window in chosen if window]


def _gathered(tables: Iterator[pa.Table], rows: int) -> list[pa.Table]:
    """The next tables, which together hold this many rows."""
    gathered: list[pa.Table] = []
    while sum(table.num_rows for table in gathered) < rows:
        gathered.append(next(tables))
    return gathered


def _read(rows: pa.Table, column: str, cached: Path | None) -> pa.Table:
    from ser_ray.speech import stream

    return pa.concat_tables(stream.read_files(rows, column, cached))
