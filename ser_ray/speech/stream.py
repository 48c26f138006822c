"""From rows of the fold to batches: what is fed to a model, read from files or held in memory, and padded.

Which rows make a batch is for `ser_ray.speech.order` to say. A source gives the tables that hold them, window by
window; nothing here knows of Ray, whose tables `ser_ray.feed` hands to the same functions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
"""A waveform (T,) and its utterance id -> another take of it, (T',)."""


@dataclass(frozen=True)
class Content:
    """Where the tables hold what a model is fed, and how to read it."""

    column: str = "audio"
    read: Callable[[pa.Buffer], np.ndarray] = from_int16
    """Bytes -> (T, ...): a waveform, or whatever else has a length."""


SPEECH: Final = Content()


def content_of(prefix: Prefix | None) -> Content:
    """What a model is fed: speech, or what a frozen ``prefix`` kept of it."""
    return SPEECH if prefix is None else Content(COLUMN, prefix.read)


@dataclass(frozen=True)
class Batch:
    """B utterances, zero padded to the longest."""

    utterance_ids: tuple[str, ...]
    inputs: torch.Tensor
    """waveform_BT, float32 in [-1, 1], T samples at 16 kHz; or what `ser_ray.models.prefix` kept of it."""
    lengths_B: torch.Tensor
    """int64: the real length of each utterance, in samples; or in frames."""
    labels_B: torch.Tensor
    """int64."""

    def __len__(self) -> int:
        return len(self.utterance_ids)

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from where a GPU copies it while it computes."""
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
) -> Iterator[Batch]:
    """The batches of one table, each given as the numbers of its rows.

    ``table`` has the columns utterance_id, label, and that of ``content``. ``augmentation`` makes another waveform of each,
    perhaps of another length: padded seconds are bounded for what the table says.
    """
    for rows in packed:
        yield _batch(table, rows, augmentation, content)


def short_to_long(table: pa.Table, batch_seconds: float, content: Content = SPEECH) -> Iterator[Batch]:
    """All of a table in memory in batches of at most ``batch_seconds`` padded seconds; num_samples is a column too."""
    return batches(table, by_length(table["num_samples"].to_numpy(), batch_seconds), content=content)


class Source(Protocol):
    """Where the batches of a split come from."""

    @property
    def rows(self) -> pa.Table:
        """Every utterance of the split, as `ser_ray.protocols.task.Task.rows` gives them."""

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """For every window a table, and the window's batches as numbers of the rows of that table.

        ``following`` says which windows will be read after these, if any will, to a source that can begin before.
        """


@dataclass(frozen=True)
class Held:
    """A split that is in memory, with the column of what a model is fed; read without a copy."""

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
    """The directory of what a frozen prefix kept, where that is what is read."""

    def read(
        self, windows: Sequence[Window], following: Callable[[], Sequence[Window]] | None = None
    ) -> Iterator[tuple[pa.Table, Window]]:
        """See `Source`."""
        for window in windows:
            own = rows_of(window)
            chosen = self.rows.take(own)
            yield joined(chosen, read_files(chosen, self.column, self.cached)), within(window, own)

    def hold(self) -> Held:
        """The same, read now, all of it."""
        return Held(joined(self.rows, read_files(self.rows, self.column, self.cached)))


def rows_of(window: Window) -> np.ndarray:
    """The rows that a window's batches hold, in the order of the files."""
    return np.sort(np.concatenate(window))


def within(window: Window, own: np.ndarray) -> Window:
    """A window's batches as numbers of the rows of a table that holds ``own`` alone."""
    return [np.searchsorted(own, batch) for batch in window]


def read_files(rows: pa.Table, column: str, cached: Path | None = None) -> Iterator[pa.Table]:
    """What the files hold of ``rows`` (utterance_id, shard, row; in the order of the files): utterance_id, ``column``.

    A table for every file, which lies beside the speech that it comes from, or in the directory ``cached``.
    """
    runs = pc.run_end_encode(rows["shard"].cast(pa.string()).combine_chunks())
    row_N, first = rows["row"].to_numpy(), 0
    for shard, last in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        path = Path(shard) if cached is None else cached / Path(shard).name
        yield shards.read_rows(path, row_N[first:last], ["utterance_id", column])
        first = last


def joined(rows: pa.Table, found: Iterable[pa.Table]) -> pa.Table:
    """``rows`` with what was found of them; they must be the same utterances, in the same order."""
    table = pa.concat_tables(found)
    assert table["utterance_id"].equals(rows["utterance_id"]), "the rows that came are not those that were asked for"
    (column,) = (name for name in table.column_names if name != "utterance_id")
    return rows.append_column(column, table[column])


class Prefetcher(Iterator[T]):
    """The same items, made in a thread that begins at once; ``depth`` of them wait at most while others are used.

    What the source raises is raised here. The thread ends with `close`, or with the reader who stops early.
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

        # The thread knows no more of its reader than these, or the reader would never be let go.
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
        """End the thread, wherever it is."""
        self._ended.set()
        self._thread.join()

    def __del__(self) -> None:
        self._ended.set()


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def _batch(table: pa.Table, rows: np.ndarray, augmentation: Augmentation | None, content: Content) -> Batch:
    # One scalar at a time: a view of the window's bytes, where take() would copy them. NumPy fills the rows, as torch
    # would start threads for copies of 100 kB, which on busy cores takes ten times as long.
    column = table[content.column]
    arrays = [content.read(column[int(row)].as_buffer()) for row in rows]
    chosen = table.select(["utterance_id", "label"]).take(rows)
    utterance_ids = chosen["utterance_id"].to_pylist()
    if augmentation is not None:
        arrays = [augmentation(array, utterance_id) for array, utterance_id in zip(arrays, utterance_ids, strict=True)]
    lengths = [len(array) for array in arrays]
    inputs = np.zeros((len(rows), max(lengths), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in enumerate(arrays):
        inputs[row, : len(array)] = array
    return Batch(
        utterance_ids=tuple(utterance_ids),
        inputs=torch.from_numpy(inputs),
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        labels_B=torch.tensor(chosen["label"].to_pylist(), dtype=torch.int64),
    )
