"""The plan of a run: all decisions before the first trial, made once in the driver and passed to every process.

It holds the space with a worker's CPUs and GPUs resolved, the shards, the split, the frozen parts that can be cached,
the resources of a trial, how many trials run at once, and the number of optimiser steps. ``plan.json`` in the results
folder is its human-readable form; ``--dry-run`` prints the plan and stops.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Final

from ser_ray import config
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.protocols.task import Task, write_fold
from ser_ray.runtime.allocation import Allocation
from ser_ray.schema import SAMPLING_RATE, SPLITS, UserError
from ser_ray.speech import order, shards
from ser_ray.speech.cached_features import Prefix

FILE: Final = "plan.json"
CACHE_KEY_FIELDS: Final = (
    "backbone",
    "adapter.method",
    "adapter.first_layer",
    "head.kind",
    "head.layer_mix",
    "head.pooling",
    "precision",
)
"""The keys on which the output of the frozen part of a model depends."""
STEP_FIELDS: Final = ("batch_seconds", "optimizer.accumulate", "epochs")
"""The keys on which the number of steps depends."""
NOT_SEARCHED: Final = object()
"""In place of a searched value where the key's conditions do not hold: the experiment's own value applies."""


@dataclass(frozen=True)
class Steps:
    """How many optimiser steps a trial takes."""

    epoch: int
    """Steps of the first epoch; the number of batches differs by a few from epoch to epoch."""
    total: int


@dataclass(frozen=True)
class RunPlan:
    """What a search, or a single trial, will run; see the module's docstring."""

    space: SearchSpace
    """The search space, with CPUs and GPUs of a worker resolved."""
    allocation: Allocation
    shard_dirs: tuple[str, ...]
    prefixes: Mapping[str, Prefix]
    """`cache_key` of an experiment -> the frozen part of its model, for every one that a trial can have."""
    splits: Mapping[str, int]
    """Utterances of train, dev and test."""
    fold: str
    """A description of the split."""
    steps: tuple[Steps, ...]
    """The fewest and the most steps of any trial of the space; one entry if they are equal."""
    seconds: float
    """Duration of all speech in the shards."""
    utterances: int
    """Number of utterances in the shards."""

    def directory(self, kind: str = "trials") -> Path:
        """The directory with the folders of trials."""
        return self.space.results_dir() / kind

    def write_fold(self, experiment: Experiment) -> Path:
        """The Parquet file of an experiment's split (`ser_ray.protocols.task`), written if it is missing."""
        return write_fold(experiment, [Path(shard_dir) for shard_dir in self.shard_dirs], self.directory("folds"))

    def prefix(self, experiment: Experiment) -> Prefix | None:
        """The frozen part that is cached for an experiment; None if nothing can be cached."""
        if uncacheable_reason(experiment, self.space.storage.prefix_gb) is not None:
            return None
        return self.prefixes[cache_key(experiment)]

    def cacheable(self) -> list[Prefix]:
        """Every frozen part whose output can be cached for some trial, once each."""
        prefixes = [self.prefix(experiment) for experiment in self._fed_differently()]
        return list({prefix.key(): prefix for prefix in prefixes if prefix is not None}.values())

    def uncacheable_reasons(self) -> list[str]:
        """Why nothing is cached for some of the trials, or for all."""
        reasons = {uncacheable_reason(e, self.space.storage.prefix_gb) for e in self._fed_differently()}
        return sorted(filter(None, reasons))

    def _fed_differently(self) -> list[Experiment]:
        """One experiment for every combination of the keys that decide whether a trial has a cache, and which one."""
        augmented = [key for key in self.space.search if key.startswith("augment.")]
        return variants(self.space, (*CACHE_KEY_FIELDS, *augmented))

    def cached_first(self) -> bool:
        """Whether caches are made before the first trial, by all workers that fit on the cluster.

        If there are more frozen parts than trials, some caches would never be used: a trial of one worker then makes
        the cache that it needs, on the device that it holds.
        """
        return self.allocation.workers != 1 or len(self.cacheable()) <= self.space.tune.trials

    def gigabytes(self, prefix: Prefix) -> float:
        """Size of a cache of all speech."""
        return prefix.gigabytes(self.seconds, self.utterances)

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json, in JSON types."""
        return {
            "space": config.to_dict(self.space),
            "allocation": asdict(self.allocation),
            "shards": list(self.shard_dirs),
            "fold": self.fold,
            "splits": dict(self.splits),
            "steps": [asdict(steps) for steps in self.steps],
            "caches": [
                {"frozen_part": str(prefix), "key": prefix.key(), "gigabytes": round(self.gigabytes(prefix), 3)}
                for prefix in self.cacheable()
            ],
        }

    def lines(self) -> Iterator[str]:
        """The human-readable plan, one fact per line."""
        own, space = self.allocation, self.space
        worker = f"{own.worker.cpus:g} CPU{'s' * (own.worker.cpus != 1)}"
        worker += f" and {own.worker.gpus:g} GPU{'s' * (own.worker.gpus > 1)}" if own.worker.gpus else ""
        if own.workers == 0:
            yield f"trials: one, in this process, without Ray, on {'the GPU' if own.cuda else 'the CPU'}"
        else:
            yield (
                f"trials: {space.tune.trials}, {own.trials_at_once} at once; each holds {own.workers} worker"
                f"{'s' * (own.workers != 1)} with {worker}"
            )
            if own.total.gpus:
                there = "" if own.cuda else "; no CUDA device is there, so trials run on the CPU"
                yield f"GPUs: {own.gpus_in_use:g} of {own.total.gpus:g} in use{there}"
            if own.sharing:
                yield f"resources.gpus_per_worker: auto: {own.sharing}"
            yield from own.idle
        counts = " / ".join(f"{count} {name}" for name, count in self.splits.items())
        yield f"split: {self.fold}; utterances {counts}"
        gigabytes = self.seconds * SAMPLING_RATE * 2 / 1e9
        yield f"speech: {self.seconds / 3600:.2f} h, {gigabytes:.2f} GB; resources.data: {space.resources.data}"
        each = " to ".join(str(steps.epoch) for steps in self.steps)
        total = " to ".join(str(steps.total) for steps in self.steps)
        yield f"steps per trial: {each} an epoch, {total} in all"
        caches = self.cacheable()
        for prefix in caches:
            yield f"cache: {prefix}: {self.gigabytes(prefix):.2f} GB"
        if caches:
            yield (
                f"caches: {sum(self.gigabytes(prefix) for prefix in caches):.2f} GB in all, room for "
                f"{space.storage.prefix_gb:g}; made "
                + ("before the first trial" if self.cached_first() else "by the trials that need them")
            )
        for reason in self.uncacheable_reasons():
            yield f"not cached: {reason}"


def make(space: SearchSpace, allocation: Allocation, shard_dirs: Sequence[Path], task: Task) -> RunPlan:
    """The plan of a space over prepared speech. Raises UserError where a backbone cannot be found."""
    from ser_ray.models import prefix

    space = space.over(task.emotions)
    worker = allocation.worker
    resources = space.resources.model_copy(update={"cpus_per_worker": worker.cpus, "gpus_per_worker": worker.gpus})
    manifests = [shards.read_manifest(directory) for directory in shard_dirs]
    return RunPlan(
        space.model_copy(update={"resources": resources}),
        allocation,
        tuple(map(str, shard_dirs)),
        {
            cache_key(experiment): prefix.of(experiment, _precision(experiment, allocation))
            for experiment in variants(space, CACHE_KEY_FIELDS)
            if _is_frozen_somewhere(experiment)
        },
        {split: len(task.labels(split)) for split in SPLITS},
        task.fold.description,
        _steps(space, task, max(1, allocation.workers)),
        sum(manifest["hours"] for manifest in manifests) * 3600,
        sum(manifest["utterances"] for manifest in manifests),
    )


def prefix_of(experiment: Experiment, allocation: Allocation, prefix_gb: float) -> Prefix | None:
    """What can be cached of an experiment's model, in the precision of these workers; None where nothing can.

    Raises UserError where its backbone cannot be found.
    """
    from ser_ray.models import prefix

    if uncacheable_reason(experiment, prefix_gb) is not None:
        return None
    return prefix.of(experiment, _precision(experiment, allocation))


def check(space: SearchSpace) -> None:
    """Check every combination of backbone and adapter, and every head, that a trial can have, before anything is
    prepared.

    Raises UserError where a backbone cannot be found, `adapter.first_layer` is beyond its last block, a variant of LoRA
    meets a method that it is not for, or a head is to start from a probe and cannot.
    """
    from ser_ray.models import heads, pretrained

    for experiment in variants(space, ("backbone", "adapter.method", "adapter.first_layer")):
        blocks = pretrained.describe(experiment.backbone)[0].num_hidden_layers
        if experiment.adapter.method != "frozen" and experiment.adapter.first_layer >= blocks:
            raise UserError(
                f"adapter.first_layer: {experiment.adapter.first_layer}, but {experiment.backbone} has blocks 0 to "
                f"{blocks - 1}; to adapt nothing set adapter.method to frozen"
            )
    variants(space, ("adapter.method", "adapter.variant"))  # every combination is validated
    for experiment in variants(space, ("head.kind", "head.init")):
        heads.of(experiment.head)


def variants(space: SearchSpace, keys: Iterable[str]) -> list[Experiment]:
    """One experiment for every combination of values that these keys can have in the trials of a space.

    A condition on a key outside of ``keys`` may hold or not, so both cases are included.
    """
    keys = tuple(keys)
    searched = [key for key in space.search if key in keys]
    experiments: dict[str, Experiment] = {}
    for values in itertools.product(*(_values(space.search[key], keys) for key in searched)):
        point: dict[str, Any] = {}
        for key, value in zip(searched, values, strict=True):
            conditions = space.search[key].when.items()
            if value is not NOT_SEARCHED and all(
                point.get(name) in allowed for name, allowed in conditions if name in keys
            ):
                point[key] = value
        experiment = space.trial(point)
        experiments.setdefault(_fingerprint(experiment, keys), experiment)
    return list(experiments.values())


def cache_key(experiment: Experiment) -> str:
    """A name for the frozen part of an experiment's model: equal for experiments that share it."""
    return _fingerprint(experiment, CACHE_KEY_FIELDS)


def uncacheable_reason(experiment: Experiment, prefix_gb: float) -> str | None:
    """Why no features of an experiment's model can be cached; None if they can."""
    augmented = sorted(key for key, value in config.to_dict(experiment.augment).items() if value)
    if augmented:
        return f"augment.{augmented[0]} changes the input of the frozen part"
    if not _is_frozen_somewhere(experiment):
        return "every weight is trained"
    return None if prefix_gb else "storage.prefix_gb is 0"


# -- below: how it is done


def _fingerprint(experiment: Experiment, keys: Iterable[str]) -> str:
    values = config.to_dict(experiment)
    return config.fingerprint([reduce(dict.__getitem__, key.split("."), values) for key in keys])


def _values(distribution: Distribution, keys: Sequence[str]) -> list[Any]:
    if distribution.randint is not None:
        values: list[Any] = list(range(distribution.randint[0], distribution.randint[1] + 1))
    else:
        values = list(distribution.examples())
    return [*values, NOT_SEARCHED] if distribution.when.keys() - set(keys) else values


def _precision(experiment: Experiment, allocation: Allocation) -> str:
    """The precision in which a frozen part is computed."""
    return allocation.precision if experiment.precision == "auto" else experiment.precision


def _is_frozen_somewhere(experiment: Experiment) -> bool:
    return experiment.adapter.method != "full" or experiment.adapter.first_layer > 0


def _steps(space: SearchSpace, task: Task, workers: int) -> tuple[Steps, ...]:
    rows = task.rows("train")

    @cache
    def batches(seconds: float, seed: int, epoch: int) -> int:
        return sum(map(len, order.epoch(rows, seconds, (seed, epoch))))

    counts = []
    for experiment in variants(space, STEP_FIELDS):
        accumulate = experiment.optimizer.accumulate
        numbers = (batches(experiment.batch_seconds, experiment.seed, e + 1) for e in range(experiment.epochs))
        steps = [len(order.steps(number, accumulate, size=workers)) for number in numbers]
        counts.append(Steps(steps[0], sum(steps)))
    least, most = min(counts, key=lambda s: (s.total, s.epoch)), max(counts, key=lambda s: (s.total, s.epoch))
    return (least,) if least == most else (least, most)
