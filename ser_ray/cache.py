"""What the frozen part of a model computes, once for all epochs and trials: ``ser-ray cache SPACE.yaml``.

Actors run the part below `adapter.first_layer` (all of the backbone where it is frozen) over the shards and write what
the rest needs, shard by shard, under ``storage.cache/prefix/<key>``; see `ser_ray.models.prefix` for what that is, and
`plan.uncacheable_reason` for when there is none. `tune` and `train` make what their plan names before the first trial,
with all workers that the cluster has room for; this command makes it beforehand. A file is named as the shard that it
comes from, and holds its rows in the same order; it is written aside and renamed: what was cut off goes on, what
changed in a corpus is made again, and the rest is found.

``storage.prefix_gb`` bounds all caches together. To make room the one that was used longest ago goes first; one that
a run is reading stays (a lock tells).
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["cache", *sys.argv[1:]]))

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

from ser_ray import cluster, config, disk, plan, prepare
from ser_ray.config import SearchSpace
from ser_ray.plan import RunPlan
from ser_ray.pool import Pool
from ser_ray.protocols.task import load_task
from ser_ray.schema import UserError
from ser_ray.speech import cached_features as form
from ser_ray.speech import shards
from ser_ray.speech.cached_features import Prefix

IN_USE: Final = ".in_use"
MAKING: Final = ".making"
BATCH_SECONDS: Final = 60.0
"""Padded seconds at once: no gradients are kept, so this takes less memory than training."""
LINE_S: Final = 10.0
"""In a log, how far a cache has come is said so often."""

Extract = Callable[[Prefix, Sequence[tuple[Path, Path]], Console], Iterable[object]]
"""Makes the files of a frozen part: pairs of a shard and what is written of it -> an item for each that is done."""


@dataclass(frozen=True)
class CachedFeatures:
    """A cache that is whole for the speech of a run: one file for every shard."""

    prefix: Prefix
    paths: tuple[Path, ...]
    made: int = 0
    """How many of them were made now."""
    seconds: float = 0.0
    """That took."""

    @property
    def gigabytes(self) -> float:
        """On disk."""
        return sum(path.stat().st_size for path in self.paths) / 1e9

    def __str__(self) -> str:
        found = f"made in {self.seconds:.0f} s" if self.made else "found"
        return f"frozen prefix {self.prefix}: {self.gigabytes:.2f} GB, {found}, in {self.paths[0].parent}"


def main(arguments: list[str]) -> int:
    """Make every cache that the trials of a search space can ask for."""
    if not arguments:
        raise UserError("name a search space, such as search_spaces/ravdess_whisper.yaml")
    space = cluster.resolve_paths(config.load(arguments[0], arguments[1:]))
    console = Console(highlight=False, soft_wrap=True)
    plan.check(space)
    cluster.connect(space)
    allocation = cluster.allocate(space, space.tune.trials, console)
    shard_dirs = prepare.prepare(space, console=console)
    planned = plan.make(space, allocation, shard_dirs, load_task(space.experiment, shard_dirs))
    for reason in planned.uncacheable_reasons():
        console.print(f"{'not' if planned.cacheable() else 'nothing is'} cached: {reason}")
    with made_first(planned, console):
        return 0


@contextmanager
def made_first(planned: RunPlan, console: Console) -> Iterator[None]:
    """Every cache of a plan, made where it is missing by all workers that the cluster has room for, and held while the
    body runs."""
    with ExitStack() as stack:
        for prefix in planned.cacheable():
            found = stack.enter_context(keep(planned, prefix, console))
            if found is not None:
                console.print(str(found))
        yield


@contextmanager
def keep(planned: RunPlan, wanted: Prefix, console: Console, here: bool = False) -> Iterator[CachedFeatures | None]:
    """The cache of a frozen part, made where it is missing, and held while the body runs.

    It is made by actors on all of the cluster, one process at a time; or with ``here`` by this process, on the device
    that it holds. Then it waits for nobody, as others may wait for that device: those who make the same cache at once
    share its shards. None where there is, with a line that says so, no room for it.
    """
    directory = _place(planned.space, wanted)
    with disk.locked(directory / IN_USE, shared=True):
        (directory / IN_USE).touch()
        kept = _whole(wanted, directory, planned.shard_dirs)
        if kept is None:
            with nullcontext() if here else _alone(directory, wanted, console):
                extract = by_this_process(planned) if here else by_pool(planned)
                kept = _make(planned, wanted, directory, console, extract)
        yield kept


@contextmanager
def find(space: SearchSpace, wanted: Prefix, shard_dirs: Iterable[str]) -> Iterator[CachedFeatures | None]:
    """The same where it is whole already, else None."""
    directory = _place(space, wanted)
    if not (directory / IN_USE).is_file():
        yield None
        return
    with disk.locked(directory / IN_USE, shared=True):
        yield _whole(wanted, directory, shard_dirs)


def by_pool(planned: RunPlan) -> Extract:
    """By actors on Ray, each with the resources of a training worker."""

    def extract(wanted: Prefix, work: Sequence[tuple[Path, Path]], console: Console) -> Iterator[object]:
        worker, size = planned.allocation.worker, min(planned.allocation.pool, len(work))
        arguments = (wanted, max(1, int(worker.cpus)), worker.gpus)
        with Pool(_RemoteExtractor, arguments, size, worker, console) as pool:
            jobs = {pair: (lambda actor, pair=pair: actor.extract.remote(*pair)) for pair in work}
            yield from pool.map(jobs, f"frozen prefix {wanted}")

    return extract


def by_this_process(planned: RunPlan) -> Extract:
    """Here, on the device that this process has."""

    def extract(wanted: Prefix, work: Sequence[tuple[Path, Path]], console: Console) -> Iterator[object]:
        worker = planned.allocation.worker
        extractor = Extractor(wanted, max(1, int(worker.cpus)), worker.gpus)
        for source, target in random.Random(os.getpid()).sample(work, len(work)):  # noqa: S311 (an order of its own)
            if not target.is_file():  # another process may have made it meanwhile
                extractor.extract(source, target)
            yield target

    return extract


class Extractor:
    """The frozen part in memory, loaded with the first shard, applied to one shard after the other."""

    def __init__(self, wanted: Prefix, threads: int, gpus: float) -> None:
        self.wanted, self.threads, self.gpus = wanted, threads, gpus
        self.backbone: Any = None

    def extract(self, source: Path, target: Path) -> None:
        """Read one shard of speech and write what is cached of it, in the order of its rows."""
        import torch

        from ser_ray.models import backbones, prefix
        from ser_ray.models.precision import autocast, bound_memory
        from ser_ray.speech import order, stream
        from ser_ray.training import memory

        # Ray hides no GPU from a process that asked for none.
        device = torch.device("cuda" if self.gpus > 0 and torch.cuda.is_available() else "cpu")
        if self.backbone is None:
            torch.set_num_threads(self.threads)
            bound_memory(self.gpus)
            wanted = self.wanted
            self.backbone = backbones.load(wanted.backbone, wanted.quantized, device, wanted.precision).eval()
        with pq.ParquetFile(source) as file:
            table = file.read(["utterance_id", "num_samples", "audio"])
        unlabelled = table.append_column("label", pa.array([0] * table.num_rows, pa.int64()))

        def compute(batch_seconds: float) -> list[bytes]:
            packed = order.by_length(table["num_samples"].to_numpy(), batch_seconds)
            arrays: list[bytes] = [b""] * table.num_rows
            for rows, batch in zip(packed, stream.batches(unlabelled, packed), strict=True):
                with autocast(self.wanted.precision, device):
                    computed = prefix.compute(self.wanted, self.backbone, batch.to(device))
                for row, array in zip(rows, computed, strict=True):
                    arrays[row] = array.tobytes()
            return arrays

        found = memory.with_what_fits(compute, BATCH_SECONDS)
        columns = [table["utterance_id"], table["num_samples"], pa.array(found, pa.large_binary())]
        with disk.replacing(target) as aside:
            # Row by row as in the source, so that the fold says where they are, and in groups of the same size.
            pq.write_table(pa.table(columns, schema=form.SCHEMA), aside, row_group_size=order.PIECE, compression="none")


# -- below: how it is done

_RemoteExtractor = ray.remote(Extractor)


@contextmanager
def _alone(directory: Path, wanted: Prefix, console: Console) -> Iterator[None]:
    """The right to make this cache; a line says so where another process is at it."""
    with disk.locked(directory / MAKING, wait=False) as at_once:
        if at_once is not False:
            yield
            return
    console.print(f"frozen prefix {wanted}: another process makes it; waiting for that")
    with disk.locked(directory / MAKING):
        yield


def _place(space: SearchSpace, wanted: Prefix) -> Path:
    return space.cache_dir() / "prefix" / wanted.key()


def _targets(directory: Path, shard_dirs: Iterable[str]) -> dict[Path, Path]:
    """Shard of speech -> the file of what is cached of it."""
    return {path: directory / path.name for shard_dir in shard_dirs for path in shards.shard_paths(Path(shard_dir))}


def _whole(wanted: Prefix, directory: Path, shard_dirs: Iterable[str]) -> CachedFeatures | None:
    """The cache where no file of it is missing."""
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
        if (room := _make_room(directory, needed, limit)) < needed:
            console.print(
                f"frozen prefix {wanted}: {needed:.2f} GB, but storage.prefix_gb leaves {room:.2f}; "
                "trained without; raise it, or keep less with head.layer_mix: last"
            )
            return None
        console.print(f"frozen prefix {wanted}: making {needed:.2f} GB in {directory}")
        _show(extract(wanted, work, console), len(work), f"frozen prefix {wanted}", console)
    return CachedFeatures(wanted, tuple(targets.values()), len(work), time.monotonic() - started)


def _show(done: Iterable[object], total: int, title: str, console: Console) -> None:
    """Progress while shards are done: a bar in a terminal, a line now and then in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = told = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, _ in enumerate(progress.track(done, total=total, description=title), start=1):
            now = time.monotonic()
            if not console.is_terminal and now - told > LINE_S and number < total:
                told = now
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
    """Remove other caches that nobody uses, those used longest ago first, until there is room; returns the GB left.

    Where all of them together would not make room enough, none is removed.
    """
    with ExitStack() as stack:
        sizes = {marker.parent: _gigabytes(marker.parent) for marker in directory.parent.glob(f"*/{IN_USE}")}
        others = sizes.keys() - {directory}
        unused = [o for o in others if stack.enter_context(disk.locked(o / IN_USE, wait=False))]
        if limit - sum(sizes.values()) + sum(sizes[one] for one in unused) < needed:
            return limit - sum(sizes.values())
        for oldest in sorted(unused, key=lambda one: (one / IN_USE).stat().st_mtime):
            if limit - sum(sizes.values()) >= needed:
                break
            shutil.rmtree(oldest, ignore_errors=True)
            del sizes[oldest]
        return limit - sum(sizes.values())


def _gigabytes(directory: Path) -> float:
    """On disk; what another process removes meanwhile counts nothing."""
    total = 0
    for path in directory.glob("*.parquet"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total / 1e9
