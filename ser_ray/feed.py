"""What the workers of a trial are fed: Ray datasets of speech, or of what a frozen prefix kept, and batches of them.

The rows of train are dealt to the workers beforehand, and blocks keep their order, so that a seed gives the same
batches however many tasks read the shards. What fits the object store stays there between epochs and is read without
a copy; the rest is streamed from the shards, with the next blocks on their way.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import ray
import ray.data

from ser_ray.config import Experiment, SearchSpace
from ser_ray.protocols.task import Task
from ser_ray.speech import shards

# torch takes seconds to import, and the processes that only start and watch a trial are many.
if TYPE_CHECKING:
    from ser_ray.speech.stream import Ahead, Batch, Content
    from ser_ray.training import loop

RESIDENT_SHARE: Final = 0.3
"""Data up to this share of the object store is kept there between epochs; more is streamed from the shards."""
READ_ROWS: Final = 256
"""Utterances a table of what is streamed."""
AHEAD_TABLES: Final = 4
"""Tables that wait for the next window, or the next epoch: 100 MB of speech."""
SHARDS_PER_WORKER: Final = 8
"""From here on workers are dealt whole shards; with fewer, shares would differ too much, and all read all."""

Read = Callable[[], Iterable[pa.Table]]


def load_datasets(
    task: Task, paths: Sequence[Path], column: str, workers: int, resident: bool
) -> dict[str, ray.data.Dataset]:
    """Ray datasets of the rows of ``paths`` that train and dev need: train_0, train_1, ... for the workers, and dev.

    All read all of dev. ``resident``: in the object store, for every trial that is handed these datasets.
    """
    dealt = _dealt(paths, task.labels("train"), workers)
    parts = {"dev": (paths, task.labels("dev"))} | {f"train_{rank}": part for rank, part in enumerate(dealt)}
    load = _resident if resident else _streamed
    datasets = {name: load(own, labels, column) for name, (own, labels) in parts.items()}
    for name, (_, labels) in parts.items():
        if resident:
            rows = datasets[name].count()
            assert rows == len(labels), f"{name}: the shards gave {rows} utterances of {len(labels)}"
    return datasets


def stays_resident(space: SearchSpace, paths: Iterable[Path]) -> bool:
    """Whether the data of a trial stay in the object store between epochs, as `resources.data` says."""
    if space.resources.data != "auto":
        return space.resources.data == "resident"
    room = RESIDENT_SHARE * ray.cluster_resources().get("object_store_memory", 0)
    return sum(path.stat().st_size for path in paths) <= room


class Tables:
    """A worker's part of a dataset, to be read epoch after epoch; resident, it is asked for once and not copied.

    Streamed, the next epoch is begun as soon as this one's rows have all been read: Ray Data takes seconds to start,
    and the last window of rows is still to be trained on. `close` ends what was begun and is not wanted any more.
    """

    def __init__(self, dataset: Any, resident: bool) -> None:
        self.dataset, self.resident = dataset, resident
        self.kept: list[pa.Table] = []
        self.begun: list[Ahead[pa.Table]] = []

    def __call__(self) -> Iterable[pa.Table]:
        """All rows."""
        if not self.resident:
            return self._stream()
        if not self.kept:
            self.kept.extend(self.dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        return self.kept

    def close(self) -> None:
        """No epoch follows."""
        while self.begun:
            self.begun.pop().close()

    def _stream(self) -> Iterator[pa.Table]:
        yield from self.begun.pop() if self.begun else self._begin()
        self.begun.append(self._begin())

    def _begin(self) -> Ahead[pa.Table]:
        from ser_ray.speech.stream import Ahead

        return Ahead(
            self.dataset.iter_batches(batch_size=READ_ROWS, batch_format="pyarrow", prefetch_batches=2), AHEAD_TABLES
        )


def data(
    experiment: Experiment, task: Task, train: Read, dev: Read, content: Content, rank: int = 0, size: int = 1
) -> loop.Data:
    """Batches for one of ``size`` processes: its own part of train, every ``size``-th batch of dev.

    They are put together in a thread, while the step before runs; on a machine with a GPU in page-locked memory.
    """
    import torch

    from ser_ray.speech import augment, stream
    from ser_ray.training import loop

    planned = stream.expected_batches(task.durations("train"), experiment.batch_seconds)
    pin = torch.cuda.is_available()

    def together(batches: Iterable[Batch]) -> Iterator[Batch]:
        return stream.Ahead(batch.pin() if pin else batch for batch in batches)

    def train_batches(epoch: int) -> Iterator[Batch]:
        seed = experiment.seed * 10_000 + epoch
        # Epoch 0 is the probe's, which sees the speech as it is.
        vary = partial(augment.vary, settings=experiment.augment, seed=seed) if epoch else None
        return together(stream.batches(train(), experiment.batch_seconds, seed=seed, vary=vary, content=content))

    def dev_batches() -> Iterator[Batch]:
        every = stream.batches(dev(), experiment.batch_seconds, seed=None, content=content)
        return together(itertools.islice(every, rank, None, size))

    return loop.Data(train_batches, dev_batches, max(1, planned // size), task.counts("train"))


# -- below: how it is done


def _resident(paths: Sequence[Path], labels: Mapping[str, int], column: str) -> ray.data.Dataset:
    """Read in this process: an hour of speech takes pyarrow milliseconds, and Ray Data the start of its tasks."""
    columns = ["utterance_id", "num_samples", column]
    return ray.data.from_blocks([shards.select(t.select(columns), labels) for t in shards.read_paths(paths)])


def _streamed(paths: Sequence[Path], labels: Mapping[str, int], column: str) -> ray.data.Dataset:
    dataset = (
        ray.data.read_parquet([str(path) for path in paths])
        .select_columns(["utterance_id", "num_samples", column])
        .map_batches(shards.select, fn_args=(labels,), batch_format="pyarrow", batch_size=None, zero_copy_batch=True)
    )
    dataset.context.execution_options.preserve_order = True
    return dataset


def _dealt(paths: Sequence[Path], labels: dict[str, int], workers: int) -> list[tuple[Sequence[Path], dict[str, int]]]:
    """Shards and utterances of every worker: shares as even as can be, the same whenever it is asked."""
    if workers == 1:
        return [(paths, labels)]
    if len(paths) < SHARDS_PER_WORKER * workers:
        return [(paths, dict(itertools.islice(labels.items(), rank, None, workers))) for rank in range(workers)]
    ids = {path: [i for i in shards.read_ids(path) if i in labels] for path in paths}
    parts: list[tuple[int, int, list[Path]]] = [(0, rank, []) for rank in range(workers)]
    for path in sorted(paths, key=lambda path: (-len(ids[path]), path.name)):
        rows, rank, own = heapq.heappop(parts)  # the smallest so far
        heapq.heappush(parts, (rows + len(ids[path]), rank, [*own, path]))
    return [(own, {i: labels[i] for path in own for i in ids[path]}) for _, _, own in sorted(parts, key=lambda p: p[1])]
