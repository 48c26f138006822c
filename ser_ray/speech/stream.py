"""From an iterator of Arrow tables to batches of similar length, bounded by padded seconds of audio.

Batches in order of arrival waste half their audio on padding when recordings last 1 to 10 s; sorted by length within a
window, a few per cent. A bound on padded seconds, not on utterances, keeps memory level whatever the lengths. Nothing
here knows where the tables come from: Ray Data feeds it in training, `shards.read_tables` without Ray.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech.audio import from_int16
from ser_ray.speech.kept import COLUMN, Prefix

JITTER: Final = 0.02
"""Lengths are varied by up to this share before sorting, so that an utterance meets other neighbours each epoch; costs
about as much padding (RAVDESS, 60 s a batch: 2.2 % with it, 0.9 % without, 4.7 % at 0.05)."""

T = TypeVar("T")
Vary = Callable[[np.ndarray, str], np.ndarray]
"""A waveform (T,) and its utterance id -> another take of it, (T',)."""


@dataclass(frozen=True)
class Content:
    """Where the tables hold what a model is fed, and how to read it."""

    column: str = "audio"
    read: Callable[[pa.Buffer], np.ndarray] = from_int16
    """Bytes -> (T, ...): a waveform, or whatever else has a length."""

    @property
    def columns(self) -> list[str]:
        """What `batches` needs of the tables, beside ``label``."""
        return ["utterance_id", "num_samples", self.column]


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
    tables: Iterable[pa.Table],
    batch_seconds: float,
    *,
    seed: int | None,
    window: int = 2048,
    vary: Vary | None = None,
    content: Content = SPEECH,
) -> Iterator[Batch]:
    """Batches of at most ``batch_seconds`` padded seconds; every utterance once, one longer than that by itself.

    ``tables`` have the columns utterance_id, num_samples (as in `shards.SCHEMA`), label, and that of ``content``.
    Utterances are gathered in windows; in each they are put in order of id, so that the order of arrival does not
    matter, sorted by slightly jittered length, packed greedily, and the batches shuffled. With ``seed`` None nothing is
    random: sorted by length, for evaluation. ``vary`` makes another waveform of each, perhaps of another length: the
    bound holds for what the tables say. A window's audio stays int16 until its batch is due: 2048 utterances of 3 s
    take 200 MB.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    for table in _windows(tables, window, content):
        yield from _window_batches(table, batch_seconds, rng, vary, content)


class Ahead(Iterator[T]):
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


def expected_batches(durations: Iterable[float], batch_seconds: float) -> int:
    """How many batches utterances of these durations [s] make: what a learning-rate schedule needs to know before.

    An estimate: windows and jitter move it by a few.

    >>> expected_batches([1.0, 2.0, 2.0, 9.0], batch_seconds=4.0)
    3
    """
    return len(_pack(sorted(durations), batch_seconds))


def _windows(tables: Iterable[pa.Table], window: int, content: Content) -> Iterator[pa.Table]:
    """The rows of ``tables``, regrouped to ``window`` rows; slices, not copies."""
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table.select([*content.columns, "label"]))
        rows += table.num_rows
        while rows >= window:
            gathered = pa.concat_tables(pending)
            yield gathered.slice(0, window)
            pending, rows = [gathered.slice(window)], rows - window
    if rows:
        yield pa.concat_tables(pending)


def _window_batches(
    table: pa.Table, batch_seconds: float, rng: np.random.Generator | None, vary: Vary | None, content: Content
) -> Iterator[Batch]:
    by_id = pc.sort_indices(table["utterance_id"]).to_numpy()
    lengths = table["num_samples"].to_numpy()[by_id].astype(np.float64)
    keys = lengths if rng is None else lengths * rng.uniform(1 - JITTER, 1 + JITTER, len(lengths))
    by_length = np.argsort(keys, kind="stable")
    packed = _pack(lengths[by_length].tolist(), batch_seconds * SAMPLING_RATE)
    for number in range(len(packed)) if rng is None else rng.permutation(len(packed)):
        yield _batch(table, by_id[by_length[packed[number]]], vary, content)


def _pack(sizes: Sequence[float], budget: float) -> list[slice]:
    """Cut ``sizes`` into runs whose count times largest size stays within ``budget``; a larger one stands alone."""
    runs: list[slice] = []
    start, largest = 0, 0.0
    for position, size in enumerate(sizes):
        if position > start and (position - start + 1) * max(largest, size) > budget:
            runs.append(slice(start, position))
            start, largest = position, 0.0
        largest = max(largest, size)
    return [*runs, slice(start, len(sizes))] if len(sizes) else runs


def _batch(table: pa.Table, rows: np.ndarray, vary: Vary | None, content: Content) -> Batch:
    # One scalar at a time: a view of the window's bytes, where take() would copy them. NumPy fills the rows, as torch
    # would start threads for copies of 100 kB, which on busy cores takes ten times as long.
    column = table[content.column]
    arrays = [content.read(column[int(row)].as_buffer()) for row in rows]
    chosen = table.select(["utterance_id", "label"]).take(rows)
    utterance_ids = chosen["utterance_id"].to_pylist()
    if vary is not None:
        arrays = [vary(array, utterance_id) for array, utterance_id in zip(arrays, utterance_ids, strict=True)]
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
