"""The feature cache: the output of a model's frozen part, computed once for all epochs and trials.

Actors run the layers below `adapter.first_layer` (the whole backbone if it is frozen) over the shards and write the
features that the rest of the model needs, one file per shard, under ``storage.cache/prefix/<key>``. What they are:
`ser_ray.models.prefix`; when there are none: `plan.uncacheable_reason`. `tune` and `train` make the caches of their
plan before the first trial, with all workers that the cluster has room for; ``ser-ray cache`` makes them beforehand.

A file has the name of its shard and its rows in the same order. It is written under another name and then renamed:
an interrupted run continues, what changed in a corpus is computed again, and the rest is reused.

``storage.prefix_gb`` limits the size of all caches together; one that another process is making counts with the size
that it will have. To make room the least recently used cache is removed first; one that a run is reading is locked and
stays.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ser_ray import disk
from ser_ray.config import SearchSpace
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.pool import Pool
from ser_ray.speech import shards
from ser_ray.speech.cached_features import SCHEMA, Prefix

IN_USE: Final = ".in_use"
MAKING: Final = ".making"
PLANNED: Final = ".planned_gb.json"
"""The size that a cache will have, in GB; it counts while a process makes the cache, and so holds its lock."""
ROOM: Final = ".room"
"""The lock under which room is looked for and planned, of all caches: two makers at once do not plan the same room."""
BATCH_SECONDS: Final = 60.0
"""Padded seconds per batch: without gradients this takes less memory than training."""
LINE_S: Final = 10.0
"""Seconds between lines of progress in a log."""
ACTOR_S: Final = 120.0
"""Seconds of speech for each actor of a pool: for less, an actor's start, eight seconds of a core, is not worth it."""

Extract = Callable[[Prefix, Sequence[tuple[Path, Path]], float, Console], Iterable[object]]
"""Writes the cached features: pairs of a shard and the file to write, and how many seconds of speech the shards hold ->
an item for each file that is done."""


@dataclass(frozen=True)
class CachedFeatures:
    """A cache that is complete for the speech of a run: one file for every shard."""

    prefix: Prefix
    paths: tuple[Path, ...]
    made: int = 0
    """How many of the files were made now."""
    seconds: float = 0.0
    """How long that took."""

    @property
    def gigabytes(self) -> float:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.paths) / 1e9

    def __str__(self) -> str:
        origin = f"made in {self.seconds:.0f} s" if self.made else "found"
        return f"frozen prefix {self.prefix}: {self.gigabytes:.2f} GB, {origin}, in {self.paths[0].parent}"


@contextmanager
def made_first(planned: RunPlan, console: Console) -> Iterator[None]:
    """Make the missing caches of a plan, with all workers that the cluster has room for, and lock them all against
    removal while the body runs."""
    with ExitStack() as stack:
        with by_pool(planned) as extract:
            for prefix in planned.cacheable():
                cached = stack.enter_context(keep(planned, prefix, console, extract))
                if cached is not None:
                    console.print(str(cached))
        yield


@contextmanager
def keep(
    planned: RunPlan, wanted: Prefix, console: Console, extract: Extract | None = None
) -> Iterator[CachedFeatures | None]:
    """The cache of a frozen part, made where files are missing, and locked against removal while the body runs.

    Actors on the whole cluster make it, those of `by_pool`, for one process at a time. Without ``extract`` this process
    makes it, on the device that it holds, and waits for no other, as others may be waiting for that device: processes
    that make the same cache at the same time share its shards. Gives None, and prints why, where there is no room for
    the cache.
    """
    directory = _place(planned.space, wanted)
    with disk.locked(directory / IN_USE, shared=True):
        (directory / IN_USE).touch()
        cached = _whole(wanted, directory, planned.shard_dirs)
        if cached is None:
            with _alone(directory, wanted, console) if extract else nullcontext():
                cached = _make(planned, wanted, directory, console, extract or by_this_process(planned))
        yield cached


@contextmanager
def find(space: SearchSpace, wanted: Prefix, shard_dirs: Iterable[str]) -> Iterator[CachedFeatures | None]:
    """The same if the cache is complete already, else None."""
    directory = _place(space, wanted)
    if not (directory / IN_USE).is_file():
        yield None
        return
    with disk.locked(directory / IN_USE, shared=True):
        yield _whole(wanted, directory, shard_dirs)


@contextmanager
def by_pool(planned: RunPlan) -> Iterator[Extract]:
    """Extraction by Ray actors, each with the resources of a training worker; they stay for the next frozen part."""
    worker, pools = planned.allocation.worker, ExitStack()
    pool: Pool | None = None

    def extract(
        wanted: Prefix, work: Sequence[tuple[Path, Path]], seconds: float, console: Console
    ) -> Iterator[object]:
        nonlocal pool
        size = min(planned.allocation.pool, len(work), math.ceil(seconds / ACTOR_S))
        if pool is None or pool.size < size:
            pools.close()
            arguments = (worker.threads, worker.gpus)
            pool = pools.enter_context(Pool(_RemoteExtractor, arguments, size, worker, console))
        jobs = {pair: (lambda actor, pair=pair: actor.extract.remote(wanted, *pair)) for pair in work}
        yield from pool.map(jobs, f"frozen prefix {wanted}")

    with pools:
        yield extract


def by_this_process(planned: RunPlan) -> Extract:
    """Extraction in this process, on the device that it holds."""

    def extract(
        wanted: Prefix, work: Sequence[tuple[Path, Path]], seconds: float, console: Console
    ) -> Iterator[object]:
        worker = planned.allocation.worker
        extractor = Extractor(worker.threads, worker.gpus)
        for source, target in random.Random(os.getpid()).sample(work, len(work)):  # noqa: S311 (its own order)
            if not target.is_file():  # another process may have made it meanwhile
                extractor.extract(wanted, source, target)
            yield target

    return extract


class Extractor:
    """Applies frozen parts of models to one shard after another; a backbone is loaded with the first shard of its own,
    in place of the one before."""

    def __init__(self, threads: int, gpus: float) -> None:
        self.threads, self.gpus = threads, gpus
        self.backbone: Any = None
        self.loaded: Prefix | None = None

    def extract(self, wanted: Prefix, source: Path, target: Path) -> None:
        """Read one shard of speech and write its cached features, in the order of its rows."""
        import torch

        from ser_ray.models import backbones, prefix
        from ser_ray.models.precision import autocast, bound_memory, choose_device
        from ser_ray.speech import order, stream
        from ser_ray.training import memory

        device = choose_device(self.gpus)
        if self.loaded is None:
            torch.set_num_threads(self.threads)
            bound_memory(self.gpus)
        if self.loaded != wanted:
            self.backbone = self.loaded = None  # two may be more than the memory holds
            self.backbone = backbones.load(wanted.backbone, wanted.quantized, device, wanted.precision).eval()
            self.loaded = wanted
        with pq.ParquetFile(source) as file:
            table = file.read(["utterance_id", "num_samples", "audio"])
        unlabelled = table.append_column("label", pa.array([0] * table.num_rows, pa.int64()))

        def compute(batch_seconds: float) -> list[bytes]:
            packed = order.by_length(table["num_samples"].to_numpy(), batch_seconds)
            arrays: list[bytes] = [b""] * table.num_rows
            for rows, batch in zip(packed, stream.batches(unlabelled, packed), strict=True):
                with autocast(wanted.precision, device):
                    computed = prefix.compute(wanted, self.backbone, batch.to(device))
                for row, array in zip(rows, computed, strict=True):
                    arrays[row] = array.tobytes()
            return arrays

        features = memory.with_what_fits(compute, BATCH_SECONDS)
        columns = [table["utterance_id"], table["num_samples"], pa.array(features, pa.large_binary())]
        with disk.replacing(target) as aside:
            # The same rows as in the source, as the fold gives row numbers, and row groups of the same size.
            pq.write_table(pa.table(columns, schema=SCHEMA), aside, row_group_size=order.PIECE, compression="none")


# -- below: how it is done

_RemoteExtractor = ray.remote(Extractor)


@contextmanager
def _alone(directory: Path, wanted: Prefix, console: Console) -> Iterator[None]:
    """Hold the lock for making this cache; prints a line if another process is making it."""
    with disk.locked(directory / MAKING, wait=False) as at_once:
        if at_once is not False:
            yield
            return
    console.print(f"frozen prefix {wanted}: waiting for another process that is making it")
    with disk.locked(directory / MAKING):
        yield


def _place(space: SearchSpace, wanted: Prefix) -> Path:
    return space.cache_dir() / "prefix" / wanted.key()


def _targets(directory: Path, shard_dirs: Iterable[str]) -> dict[Path, Path]:
    """Shard of speech -> the file of its cached features."""
    return {path: directory / path.name for shard_dir in shard_dirs for path in shards.shard_paths(Path(shard_dir))}


def _whole(wanted: Prefix, directory: Path, shard_dirs: Iterable[str]) -> CachedFeatures | None:
    """The cache, or None if any file of it is missing."""
    targets = tuple(_targets(directory, shard_dirs).values())
    return CachedFeatures(wanted, targets) if all(target.is_file() for target in targets) else None


def _make(
    planned: RunPlan, wanted: Prefix, directory: Path, console: Console, extract: Extract
) -> CachedFeatures | None:
    targets = _targets(directory, planned.shard_dirs)
    work = [(source, target) for source, target in targets.items() if not target.is_file()]
    started = time.monotonic()
    if work:
        seconds, utterances = _size(source for source, _ in work)
        needed, limit = wanted.gigabytes(seconds, utterances), planned.space.storage.prefix_gb
        with disk.locked(directory.parent / ROOM):
            if (room := _make_room(directory, needed, limit)) >= needed:
                disk.write_json(directory / PLANNED, _gigabytes(directory) + needed)
        if room < needed:
            console.print(
                f"frozen prefix {wanted}: {needed:.2f} GB, but storage.prefix_gb leaves {room:.2f}; "
                "training without the cache; raise it, or cache fewer states with head.layer_mix: last"
            )
            return None
        console.print(f"frozen prefix {wanted}: making {needed:.2f} GB in {directory}")
        _show(extract(wanted, work, seconds, console), len(work), f"frozen prefix {wanted}", console)
        (directory / PLANNED).unlink(missing_ok=True)
    return CachedFeatures(wanted, tuple(targets.values()), len(work), time.monotonic() - started)


def _show(done: Iterable[object], total: int, title: str, console: Console) -> None:
    """Show progress: a bar in a terminal, a line now and then in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = last_line = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, _ in enumerate(progress.track(done, total=total, description=title), start=1):
            now = time.monotonic()
            if not console.is_terminal and now - last_line > LINE_S and number < total:
                last_line = now
                left = (now - started) / number * (total - number)
                console.print(f"{title}: {number} of {total} shards, about {left:.0f} s left")


def _size(paths: Iterable[Path]) -> tuple[float, int]:
    """Seconds and utterances in shards of speech."""
    durations: list[float] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            durations += file.read(["duration"])["duration"].to_pylist()
    return sum(durations), len(durations)


def _make_room(directory: Path, needed: float, limit: float) -> float:
    """Remove unused other caches, least recently used first, until there is room; returns the GB that are left.

    If removing all of them would not make enough room, none is removed.
    """
    with ExitStack() as stack:
        sizes = {marker.parent: _gigabytes(marker.parent) for marker in directory.parent.glob(f"*/{IN_USE}")}
        others = sizes.keys() - {directory}
        unused = [o for o in others if stack.enter_context(disk.locked(o / IN_USE, wait=False))]
        for used in others.difference(unused):
            with suppress(FileNotFoundError):  # of a cache that is complete
                sizes[used] = max(sizes[used], disk.read_json(used / PLANNED))
        if limit - sum(sizes.values()) + sum(sizes[one] for one in unused) < needed:
            return limit - sum(sizes.values())
        for oldest in sorted(unused, key=lambda one: (one / IN_USE).stat().st_mtime):
            if limit - sum(sizes.values()) >= needed:
                break
            shutil.rmtree(oldest, ignore_errors=True)
            del sizes[oldest]
        return limit - sum(sizes.values())


def _gigabytes(directory: Path) -> float:
    """Size on disk; files that another process removes meanwhile count as 0."""
    total = 0
    for path in directory.glob("*.parquet"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total / 1e9
