"""From rows of the fold to batches: a model's input, read from files or held in memory, and padded.

`ser_ray.speech.order` decides which rows form a batch. A source gives the tables that contain them, window by window.
Nothing here depends on Ray; `ser_ray.runtime.feed` passes Ray's tables to the same functions.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ser_ray.speech import shards
from ser_ray.speech.audio import from_int16
from ser_ray.speech.cached_features import COLUMN, Prefix
from ser_ray.speech.order import Window, by_length

T = TypeVar("T")
Augmentation = Callable[[np.ndarray, str], np.ndarray]
"""A waveform (T,) and its utterance id -> an augmented version, (T',)."""


@dataclass(frozen=True)
class Content:
    """The column of a model's input, and how to decode it."""

    column: str = "audio"
    read: Callable[[pa.Buffer], np.ndarray] = from_int16
    """Bytes -> (T, ...): a waveform, or another array with a length."""


SPEECH: Final = Content()


def content_of(prefix: Prefix | None) -> Content:
    """The input of a model: speech, or the cached features of a frozen ``prefix``."""
    return SPEECH if prefix is None else Content(COLUMN, prefix.read)


@dataclass(frozen=True)
class Batch:
    """B utterances, zero padded to the longest."""

    utterance_ids: tuple[str, ...]
    inputs: torch.Tensor
    """waveform_BT, float32 in [-1, 1], T samples at 16 kHz; or the cached features of `ser_ray.models.prefix`."""
    lengths_B: torch.Tensor
    """int64: the length of each utterance without padding, in samples; or in frames."""
    labels_B: torch.Tensor
    """int64."""
    padded: bool = True
    """Whether the lengths may differ. Known without a look at `lengths_B`, for which the host would wait for a GPU."""

    def __len__(self) -> int:
        return len(self.utterance_ids)

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU can copy it while it computes."""
        return replace(
            self,
            inputs=self.inputs.pin_memory(),
            lengths_B=self.lengths_B.pin_memory(),
            labels_B=self.labels_B.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=True),
            lengths_B=self.lengths_B.to(device, non_blocking=True),
            labels_B=self.labels_B.to(device, non_blocking=True),
        )


def batches(
    table: pa.Table,
    packed: Iterable[np.ndarray],
    *,
    augmentation: Augmentation | None = None,
    content: Content = SPEECH,
    threads: int = 1,
) -> Iterator[Batch]:
    """The batches of one table, each given in ``packed`` as its row numbers.

    ``table`` has the columns utterance_id, label, and that of ``content``. ``augmentation`` may change the length of a
    waveform: the bound on padded seconds is for the lengths in the table. ``threads`` of them share the utterances of
    a batch; batches are the same for any number.
    """
    read = partial(_arrays, table, augmentation=augmentation, content=content)
    with ThreadPoolExecutor(threads) as pool:  # its threads start when they get work
        for rows in packed:
            parts = np.array_split(rows, min(threads, len(rows)))
            found = pool.map(read, parts) if len(parts) > 1 else map(read, parts)
            yield _batch(table, rows, list(itertools.chain.from_iterable(found)))


def short_to_long(table: pa.Table, batch_seconds: float, content: Content = SPEECH) -> Iterator[Batch]:
    """All rows of a table, which also has num_samples, in batches of at most ``batch_seconds`` padded seconds."""
    return batches(table, by_length(table["num_samples"].to_numpy(), batch_seconds), content=content)


class Source(Protocol):
    """Where the batches of a split come from."""

    @property
    def rows(self) -> pa.Table:
        """Every utterance of the split, as `ser_ray.protocols.task.Task.rows` gives them."""

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """For every window a table, and the window's batches as row numbers of that table.

        ``following`` returns the windows that will be read after these, if any, for a source that can start early.
        """


@dataclass(frozen=True)
class Held:
    """A split that is in memory, with the column of a model's input; read without a copy."""

    rows: pa.Table

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """See `Source`."""
        for window in windows:
            yield self.rows, window


@dataclass(frozen=True)
class Files:
    """A split that is read from its files, a window at a time."""

    rows: pa.Table
    column: str = "audio"
    cached: Path | None = None
    """The directory of cached features, if these are what is read."""

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """See `Source`."""
        for window in windows:
            own = rows_of(window)
            chosen = self.rows.take(own)
            yield joined(chosen, read_files(chosen, self.column, self.cached)), within(window, own)

    def hold(self) -> Held:
        """The same split, read into memory now."""
        return Held(joined(self.rows, read_files(self.rows, self.column, self.cached)))


def rows_of(window: Window) -> np.ndarray:
    """The rows of a window's batches, in the order of the files."""
    return np.sort(np.concatenate(window))


def within(window: Window, own: np.ndarray) -> Window:
    """A window's batches as row numbers of a table that has only the rows ``own``."""
    return [np.searchsorted(own, batch) for batch in window]


def read_files(rows: pa.Table, column: str, cached: Path | None = None) -> Iterator[pa.Table]:
    """The utterance_id and ``column`` of ``rows`` (utterance_id, shard, row; in the order of the files).

    One table per file: the shard itself, or the file of the same name in the directory ``cached``.
    """
    runs = pc.run_end_encode(rows["shard"].cast(pa.string()).combine_chunks())
    row_N, first = rows["row"].to_numpy(), 0
    for shard, last in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        path = Path(shard) if cached is None else cached / Path(shard).name
        yield shards.read_rows(path, row_N[first:last], ["utterance_id", column])
        first = last


def joined(rows: pa.Table, found: Iterable[pa.Table]) -> pa.Table:
    """``rows`` with the column of the tables ``found``, which must have the same utterances in the same order."""
    table = pa.concat_tables(found)
    assert table["utterance_id"].equals(rows["utterance_id"]), "the rows that were read are not those requested"
    (column,) = (name for name in table.column_names if name != "utterance_id")
    return rows.append_column(column, table[column])


class Prefetcher(Iterator[T]):
    """The items of ``source``, produced in a thread that starts at once; at most ``depth`` of them are queued.

    Exceptions of the source are raised here. The thread ends with `close`, or when a reader that stops early is freed.
    """

    def __init__(self, source: Iterable[T], depth: int = 2) -> None:
        waiting: queue.Queue[T | _End] = queue.Queue(depth)
        ended = threading.Event()

        def put(item: T | _End) -> bool:
            while not ended.is_set():
                try:
                    waiting.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def fill() -> None:
            try:
                for item in source:
                    if not put(item):
                        return
                put(_End(None))
            except BaseException as error:
                put(_End(error))

        # The thread refers to these alone and not to self, which would never be freed otherwise.
        self._waiting, self._ended = waiting, ended
        self._thread = threading.Thread(target=fill, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended.is_set():
            raise StopIteration
        item = self._waiting.get()
        if not isinstance(item, _End):
            return item
        self.close()
        raise item.error or StopIteration

    def close(self) -> None:
        """Stop the thread, even before the end of the source."""
        self._ended.set()
        self._thread.join()

    def __del__(self) -> None:
        self._ended.set()


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _arrays(table: pa.Table, rows: np.ndarray, augmentation: Augmentation | None, content: Content) -> list[np.ndarray]:
    """The model's input of these rows, decoded and augmented."""
    # One scalar at a time is a view of the window's bytes; take() would copy them.
    column = table[content.column]
    arrays = [content.read(column[int(row)].as_buffer()) for row in rows]
    if augmentation is None:
        return arrays
    ids = table["utterance_id"].take(rows).to_pylist()
    return [augmentation(array, utterance_id) for array, utterance_id in zip(arrays, ids, strict=True)]


def _batch(table: pa.Table, rows: np.ndarray, arrays: Sequence[np.ndarray]) -> Batch:
    # NumPy fills the rows: torch would start threads for copies of 100 kB, which takes ten times as long on busy cores.
    chosen = table.select(["utterance_id", "label"]).take(rows)
    lengths = [len(array) for array in arrays]
    inputs = np.zeros((len(rows), max(lengths), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in enumerate(arrays):
        inputs[row, : len(array)] = array
    return Batch(
        utterance_ids=tuple(chosen["utterance_id"].to_pylist()),
        inputs=torch.from_numpy(inputs),
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        labels_B=torch.tensor(chosen["label"].to_pylist(), dtype=torch.int64),
        padded=len(set(lengths)) > 1,
    )
