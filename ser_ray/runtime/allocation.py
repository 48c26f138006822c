"""What a trial needs of a cluster, how many trials run at once, and what stays idle: arithmetic over nodes, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ser_ray.config import Resources, SearchSpace
from ser_ray.schema import UserError

DATA_CPUS: Final = 1
"""Logical CPUs of a node that trials leave free: Ray Data's tasks would wait forever if trainers held all of them."""
MOST_CPUS: Final = 4.0
"""Maximum CPUs of a worker with a GPU: its threads decode, augment and collate. With every augmentation on, three make
2280 utterances of 4 s a second, three times what a large card takes (results/benchmarks/feed.md)."""


@dataclass(frozen=True)
class Node:
    """What one node of the cluster offers, in Ray's logical CPUs and GPUs."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Worker:
    """Resources of one training worker."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """How many threads its process computes with."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Allocation:
    """How trials share the cluster; made by `allocate`."""

    workers: int
    """Data-parallel processes per trial; 0: the trial runs in this process, without Ray."""
    worker: Worker
    pool: int
    """Workers that fit on the cluster at once: the size of an actor pool while no trial runs."""
    trials_at_once: int
    total: Node
    """CPUs available to trials, and GPUs, summed over all nodes."""
    idle: tuple[str, ...] = ()
    """Unused resources and the reason, one sentence each."""
    cuda: bool = False
    """Whether workers see a CUDA device: GPUs declared to Ray may not exist."""
    precision: str = "fp32"
    """What ``precision: auto`` resolves to on a worker."""
    sharing: str = ""
    """How many trials share a GPU and why, where ``gpus_per_worker: auto`` chose it."""

    @property
    def wanted(self) -> str:
        """The resources of a trial, for messages."""
        return f"{self.workers} x ({self.worker.cpus:g} CPUs, {self.worker.gpus:g} GPUs), each on one node"

    @property
    def gpus_in_use(self) -> float:
        """GPUs used by all concurrent trials."""
        return self.trials_at_once * max(1, self.workers) * self.worker.gpus


def here(cuda: bool, precision: str, cpus: float = 1.0) -> Allocation:
    """The allocation of a trial in this process, which shares nothing."""
    return Allocation(0, Worker(cpus, float(cuda)), 1, 1, Node(cpus, float(cuda)), cuda=cuda, precision=precision)


def allocate(nodes: Sequence[Node], space: SearchSpace, trials: int) -> Allocation:
    """How ``trials`` of a space share the nodes. Each worker is on one node; CPUs for data stay free (`capacity`).

    Raises UserError where not even one trial fits: Ray itself would wait forever.

    >>> from ser_ray.config import SearchSpace
    >>> experiment = {"name": "x", "corpora": {"synthetic": None}, "backbone": "embedded/tiny-whisper"}
    >>> space = SearchSpace.model_validate({"experiment": experiment})
    >>> allocate([Node(16, 8)], space, trials=24).trials_at_once
    8
    """
    worker = _worker(nodes, space.resources)
    workers = max(1, space.resources.workers)
    pool = capacity(nodes, worker)
    fits = pool // workers
    if fits < 1:
        raise UserError(_too_large(nodes, worker, workers))
    at_once = min(fits, space.tune.concurrency or fits, trials)
    total = Node(sum(max(0.0, node.cpus - DATA_CPUS) for node in nodes), sum(node.gpus for node in nodes))
    allocation = Allocation(space.resources.workers, worker, pool, at_once, total)
    return replace(allocation, idle=tuple(_idle(nodes, space, trials, allocation)))


def capacity(nodes: Sequence[Node], worker: Worker) -> int:
    """Workers that fit at once, each on one node, with a CPU reserved for data on every node.

    If no worker fits that way, the CPU is reserved on one node only: the one where this costs the fewest workers.
    """
    room = sorted(nodes, key=lambda node: (node.cpus, node.gpus), reverse=True)
    all_reserved = sum(_fits(node.cpus - DATA_CPUS, node.gpus, worker) for node in room)
    return all_reserved or max(
        (
            sum(_fits(node.cpus - DATA_CPUS * (i == reserved), node.gpus, worker) for i, node in enumerate(room))
            for reserved in range(len(room))
        ),
        default=0,
    )


# -- below: how it is done


def _worker(nodes: Sequence[Node], wanted: Resources) -> Worker:
    """Resources of a worker with ``auto`` resolved. With GPUs: the most CPUs that leave no GPU of a node unused."""
    has_gpu = any(node.gpus for node in nodes)
    gpus = float(has_gpu) if wanted.gpus_per_worker == "auto" else wanted.gpus_per_worker
    if wanted.cpus_per_worker != "auto":
        return Worker(wanted.cpus_per_worker, gpus)
    shares = [
        (node.cpus - DATA_CPUS) / on_node
        for node in nodes
        if gpus and (on_node := _fits(math.inf, node.gpus, Worker(0, gpus)))
    ]
    share = min(shares, default=1.0)
    if share >= 1:
        return Worker(min(MOST_CPUS, float(math.floor(share))) if gpus else 1.0, gpus)
    return Worker(max(0.1, math.floor(share * 10) / 10), gpus)


def _fits(cpus: float, gpus: float, worker: Worker) -> int:
    """Workers that fit on one node. Ray puts a fractional worker on a single GPU: three of 0.3 GPUs fit on one."""
    if 0 < worker.gpus < 1:
        by_gpu = int(gpus) * int(1 / worker.gpus + 1e-9)
    else:
        by_gpu = int(gpus / worker.gpus + 1e-9) if worker.gpus else 10**6
    by_cpu = int(cpus / worker.cpus + 1e-9) if worker.cpus and math.isfinite(cpus) else 10**6
    return max(0, min(by_cpu, by_gpu))


def _too_large(nodes: Sequence[Node], worker: Worker, workers: int) -> str:
    has = ", ".join(f"{max(0.0, node.cpus - DATA_CPUS):g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    problem = "has too few GPUs" if worker.gpus > sum(node.gpus for node in nodes) else "is too small"
    return (
        f"resources: a trial needs {workers} x ({worker.cpus:g} CPUs, {worker.gpus:g} GPUs), each on one node, but the "
        f"cluster {problem}: its {len(nodes)} node{'s have' if len(nodes) > 1 else ' has'} {has}, beside "
        f"{DATA_CPUS} CPU for data; lower resources.workers, cpus_per_worker or gpus_per_worker"
    )


def _idle(nodes: Sequence[Node], space: SearchSpace, trials: int, allocation: Allocation) -> Iterator[str]:
    worker, per_trial = allocation.worker, max(1, allocation.workers)
    if allocation.total.gpus:
        used, total, unit = allocation.gpus_in_use, allocation.total.gpus, "GPUs"
    else:
        used, total, unit = allocation.trials_at_once * per_trial * worker.cpus, allocation.total.cpus, "cores"
    left = total - used
    if left < (0.05 if unit == "GPUs" else 1):
        return
    fits = allocation.pool // per_trial
    without_cpu_limit = sum(_fits(math.inf, node.gpus, worker) for node in nodes) // per_trial
    if unit == "GPUs" and not worker.gpus:
        reason = "resources.gpus_per_worker is 0"
    elif allocation.trials_at_once < fits and allocation.trials_at_once == trials:
        reason = f"there {'is one trial' if trials == 1 else f'are {trials} trials'} to run"
    elif allocation.trials_at_once < fits:
        reason = f"tune.concurrency is {space.tune.concurrency}"
    elif unit == "GPUs" and without_cpu_limit > fits:
        reason = f"a worker takes {worker.cpus:g} CPUs, and the nodes have no more; lower resources.cpus_per_worker"
    elif allocation.pool % per_trial:
        reason = f"a trial takes {per_trial} workers, and {allocation.pool} fit; change resources.workers"
    else:
        part = f"{worker.gpus:g} GPUs" if unit == "GPUs" else f"{worker.cpus:g} CPUs"
        reason = f"workers of {part} do not fill the nodes; change resources"
    yield f"{left:g} of {total:g} {unit} idle: {reason}"
