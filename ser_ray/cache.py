"""What the frozen part of a model computes, once for all epochs and trials: ``ser-ray cache SPACE.yaml``.

A pool of Ray Data actors runs the part below `adapter.first_layer` (all of the backbone where it is frozen) over the
shards and keeps what the rest needs, shard by shard, under ``storage.cache/prefix/<key>``; see `ser_ray.models.prefix`
for what that is and when there is none. `tune` and `train` make what they need by themselves; this command makes it
before, such as on another machine. A shard is named as the speech that it comes from, written aside and renamed: what
was cut off goes on, what changed in a corpus is made again, and the rest is found.

``storage.prefix_gb`` bounds all caches together. To make room the one that was used longest ago goes first; one that
a trial is reading stays (a lock tells).
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["cache", *sys.argv[1:]]))

import itertools
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ser_ray import cluster, config, disk, prepare
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.schema import UserError
from ser_ray.speech import kept as form
from ser_ray.speech import shards
from ser_ray.speech.kept import Prefix

Plan = Mapping[str, Prefix]
"""What decides on a frozen part, as a fingerprint -> the frozen part."""
IN_USE: Final = ".in_use"
MAKING: Final = ".making"
DECIDING: Final = ("backbone", "adapter.method", "adapter.first_layer", "head.layer_mix", "head.pooling", "precision")
"""The keys on which a frozen part depends."""
BATCH_SECONDS: Final = 60.0
"""Padded seconds at once: no gradients are kept, so this takes less memory than training."""


@dataclass(frozen=True)
class Kept:
    """A cache that is whole for an experiment's speech: one file for every shard of the speech."""

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
    space = cluster.settle_paths(config.load(arguments[0], arguments[1:]))
    console = Console(highlight=False, soft_wrap=True)
    cluster.connect(space)
    actors = cluster.capacity(space)
    shard_dirs = prepare.prepare(space, console=console)
    for experiment in experiments(space):
        if reason := why_not(space, experiment):
            console.print(f"nothing is kept: {reason}")
            continue
        with keep(space, experiment, plan(space), shard_dirs, actors, console) as kept:
            console.print(str(kept or ""))
    return 0


def why_not(space: SearchSpace, experiment: Experiment) -> str | None:
    """Why nothing of an experiment's model is computed beforehand; None where it is."""
    varied = sorted(key for key, value in config.to_dict(experiment.augment).items() if value)
    if varied:
        return f"augment.{varied[0]} varies what the frozen part sees"
    if not _is_frozen_somewhere(experiment):
        return "every weight learns"
    return None if space.storage.prefix_gb else "storage.prefix_gb is 0"


def experiments(space: SearchSpace) -> list[Experiment]:
    """Experiments that between them have every frozen part that the trials of a space can have."""
    searched = [key for key in space.search if key in DECIDING]
    found: dict[str, Experiment] = {}
    for values in itertools.product(*(_values(space.search[key]) for key in searched)):
        point: dict[str, Any] = {}
        for key, value in zip(searched, values, strict=True):
            conditions = space.search[key].when.items()
            if all(point.get(name) in allowed for name, allowed in conditions if name in DECIDING):
                point[key] = value
        experiment = space.trial(point)
        found.setdefault(_decided(experiment), experiment)
    return list(found.values())


def plan(space: SearchSpace) -> Plan:
    """What is kept for every trial of a space, to be looked up by processes that have no torch loaded.

    Raises UserError where a backbone cannot be found.
    """
    from ser_ray.models import prefix

    gpus = cluster.worker(space).gpus if space.resources.workers else 0.0
    return {
        _decided(experiment): prefix.of(experiment, _precision(experiment, gpus))
        for experiment in experiments(space)
        if _is_frozen_somewhere(experiment)
    }


@contextmanager
def keep(
    space: SearchSpace,
    experiment: Experiment,
    planned: Plan,
    shard_dirs: Sequence[Path],
    actors: int,
    console: Console,
) -> Iterator[Kept | None]:
    """The cache of an experiment's frozen part, made where it is missing, and held while the body runs.

    None where there is nothing to keep or, with a line that says so, no room for it. ``actors`` run at once, each with
    the resources of a worker; 0: in this process, without Ray.
    """
    if why_not(space, experiment) is not None:
        yield None
        return
    wanted = planned[_decided(experiment)]
    directory = _place(space, wanted)
    with disk.locked(directory / IN_USE, shared=True):
        (directory / IN_USE).touch()
        with disk.locked(directory / MAKING):
            kept = _make(space, experiment, wanted, directory, shard_dirs, actors, console)
        yield kept


@contextmanager
def find(
    space: SearchSpace, experiment: Experiment, planned: Plan, shard_dirs: Sequence[Path]
) -> Iterator[Kept | None]:
    """The same where it is whole already, else None."""
    if why_not(space, experiment) is not None:
        yield None
        return
    wanted = planned[_decided(experiment)]
    directory = _place(space, wanted)
    if not (directory / IN_USE).is_file():
        yield None
        return
    with disk.locked(directory / IN_USE, shared=True):
        targets = tuple(_targets(directory, shard_dirs).values())
        yield Kept(wanted, targets) if all(target.is_file() for target in targets) else None


class Keeper:
    """An actor of the pool: the frozen part in memory, applied to one shard after the other."""

    def __init__(self, experiment: Experiment, wanted: Prefix, threads: int, gpu: bool) -> None:
        import torch

        from ser_ray.models import backbones

        torch.set_num_threads(threads)
        self.experiment, self.wanted = experiment, wanted
        self.device = torch.device("cuda" if gpu else "cpu")
        self.backbone = backbones.load(wanted.backbone, wanted.quantized, self.device).eval()

    def __call__(self, work: pa.Table) -> pa.Table:
        """Rows of source (a shard of speech) and target -> the same, when every target is written."""
        for row in work.to_pylist():
            self.keep(Path(row["source"]), Path(row["target"]))
        return work

    def keep(self, source: Path, target: Path) -> None:
        """Read one shard of speech and write what is kept of it."""
        from ser_ray.models import prefix
        from ser_ray.models.classifier import autocast
        from ser_ray.speech import order, stream

        with pq.ParquetFile(source) as file:
            table = file.read(["utterance_id", "num_samples", "audio"])
        packed = order.by_length(table["num_samples"].to_numpy(), BATCH_SECONDS)
        unlabelled = table.append_column("label", pa.array([0] * table.num_rows, pa.int64()))
        found: list[bytes] = [b""] * table.num_rows
        for rows, batch in zip(packed, stream.batches(unlabelled, packed), strict=True):
            with autocast(self.experiment, self.device):
                arrays = prefix.compute(self.wanted, self.backbone, batch.to(self.device))
            for row, array in zip(rows, arrays, strict=True):
                found[row] = array.tobytes()
        columns = [table["utterance_id"], table["num_samples"], pa.array(found, pa.large_binary())]
        with disk.replacing(target) as aside:
            # Row by row as in the source, so that the fold says where they are, and in groups of the same size.
            pq.write_table(pa.table(columns, schema=form.SCHEMA), aside, row_group_size=order.PIECE, compression="none")


# -- below: how it is done


def _place(space: SearchSpace, wanted: Prefix) -> Path:
    return space.cache_dir() / "prefix" / wanted.key()


def _targets(directory: Path, shard_dirs: Sequence[Path]) -> dict[Path, Path]:
    """Shard of speech -> the file of what is kept of it."""
    return {path: directory / path.name for shard_dir in shard_dirs for path in shards.shard_paths(shard_dir)}


def _make(
    space: SearchSpace,
    experiment: Experiment,
    wanted: Prefix,
    directory: Path,
    shard_dirs: Sequence[Path],
    actors: int,
    console: Console,
) -> Kept | None:
    targets = _targets(directory, shard_dirs)
    work = [{"source": str(s), "target": str(t)} for s, t in targets.items() if not t.is_file()]
    started = time.monotonic()
    if work:
        missing = {Path(row["source"]) for row in work}
        seconds, utterances = _size(sorted(missing))
        needed = wanted.gigabytes(seconds, utterances)
        if (room := _make_room(directory, needed, space.storage.prefix_gb)) < needed:
            console.print(
                f"frozen prefix {wanted}: {needed:.2f} GB, but storage.prefix_gb leaves {room:.2f}; "
                "trained without; raise it, or keep less with head.layer_mix: last"
            )
            return None
        console.print(f"frozen prefix {wanted}: making {needed:.2f} GB in {directory}")
        _compute(work, experiment, wanted, actors, space, console)
    return Kept(wanted, tuple(targets.values()), len(work), time.monotonic() - started)


def _compute(
    work: list[dict[str, str]],
    experiment: Experiment,
    wanted: Prefix,
    actors: int,
    space: SearchSpace,
    console: Console,
) -> None:
    title = f"frozen prefix {wanted}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for _ in progress.track(
            _with_ray(work, experiment, wanted, actors, space) if actors else _here(work, experiment, wanted),
            total=len(work),
            description=title,
        ):
            pass


def _with_ray(
    work: list[dict[str, str]], experiment: Experiment, wanted: Prefix, actors: int, space: SearchSpace
) -> Iterator[object]:
    """The targets, as they appear."""
    one = cluster.worker(space)
    task = _run_pool.remote(work, experiment, wanted, min(actors, len(work)), one)
    awaited = [Path(row["target"]) for row in work]
    ended: list[Any] = []
    while not ended:
        ended, _ = ray.wait([task], timeout=0.5)
        there = [target for target in awaited if target.is_file()]
        yield from there
        awaited = [target for target in awaited if target not in there]
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise cluster.user_error(error) or error from None


@ray.remote(num_cpus=0)
def _run_pool(
    work: list[dict[str, str]], experiment: Experiment, wanted: Prefix, actors: int, one: cluster.Worker
) -> None:
    """In a process of its own, where what Ray Data has to say to developers goes to a log."""
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
        Keeper,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=one.cpus,
        num_gpus=one.gpus or None,
        fn_constructor_args=(experiment, wanted, max(1, int(one.cpus)), one.gpus > 0),
    )
    dataset.materialize()


def _here(work: list[dict[str, str]], experiment: Experiment, wanted: Prefix) -> Iterator[object]:
    import torch

    keeper = Keeper(experiment, wanted, torch.get_num_threads(), torch.cuda.is_available())
    for row in work:
        keeper.keep(Path(row["source"]), Path(row["target"]))
        yield row


def _values(distribution: Distribution) -> Iterable[Any]:
    if distribution.randint is not None:
        return range(distribution.randint[0], distribution.randint[1] + 1)
    return distribution.examples()


def _precision(experiment: Experiment, gpus: float) -> str:
    """What ``auto`` comes to may differ between a GPU and a CPU, and so may the values."""
    return experiment.precision if experiment.precision != "auto" else ("auto on a GPU" if gpus else "fp32")


def _is_frozen_somewhere(experiment: Experiment) -> bool:
    return experiment.adapter.method != "full" or experiment.adapter.first_layer > 0


def _decided(experiment: Experiment) -> str:
    values = config.to_dict(experiment)
    return config.fingerprint([reduce(dict.__getitem__, key.split("."), values) for key in DECIDING])


def _size(paths: Iterable[Path]) -> tuple[float, int]:
    """Seconds and utterances in shards of speech."""
    durations: list[float] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            durations += file.read(["duration"])["duration"].to_pylist()
    return sum(durations), len(durations)


def _make_room(directory: Path, needed: float, limit: float) -> float:
    """Remove other caches that nobody uses, those used longest ago first, until there is room; returns the GB left."""
    caches = {marker.parent: _gigabytes(marker.parent) for marker in directory.parent.glob(f"*/{IN_USE}")}
    others = sorted(caches.keys() - {directory}, key=lambda path: (path / IN_USE).stat().st_mtime)
    while limit - sum(caches.values()) < needed and others:
        oldest = others.pop(0)
        with disk.locked(oldest / IN_USE, wait=False) as free:
            if free:
                shutil.rmtree(oldest)
                del caches[oldest]
    return limit - sum(caches.values())


def _gigabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.glob("*.parquet")) / 1e9
