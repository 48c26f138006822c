"""What a trial takes of a cluster, how many trials run at once, and what stays idle: arithmetic over nodes, no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ser_ray.config import Resources, SearchSpace
from ser_ray.schema import UserError

DATA_CPUS: Final = 1
"""Logical CPUs of a node that no trial may take: Ray Data's tasks would wait for ever if trainers held every one."""
MOST_CPUS: Final = 4.0
"""CPUs of a worker with a GPU, at most: its threads decode and collate, which more of them do no faster."""


@dataclass(frozen=True)
class Node:
    """What one node of the cluster offers, in Ray's logical CPUs and GPUs."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Worker:
    """What one training worker takes."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Allocation:
    """How trials share the cluster; made by `allocate`."""

    workers: int
    """Data-parallel processes of a trial; 0: it is trained in this process, without Ray."""
    worker: Worker
    pool: int
    """Workers that fit on the cluster at once: the size of a pool of actors while no trial runs."""
    trials_at_once: int
    total: Node
    """CPUs for trials and GPUs, over all nodes."""
    idle: tuple[str, ...] = ()
    """What stays unused and why, a sentence each."""
    cuda: bool = False
    """Whether workers see a CUDA device: GPUs that are declared to Ray need not be there."""
    precision: str = "fp32"
    """What ``precision: auto`` comes to on a worker."""

    @property
    def gpus_in_use(self) -> float:
        """By all trials that run at once."""
        return self.trials_at_once * max(1, self.workers) * self.worker.gpus


def here(cuda: bool, precision: str, cpus: float = 1.0) -> Allocation:
    """That of a trial in this process, which shares nothing."""
    return Allocation(0, Worker(cpus, float(cuda)), 1, 1, Node(cpus, float(cuda)), cuda=cuda, precision=precision)


def allocate(nodes: Sequence[Node], space: SearchSpace, trials: int) -> Allocation:
    """How ``trials`` of a space share the nodes: every worker on one node, a CPU for the data left on each.

    Raises UserError where not even one trial fits: Ray itself would wait for ever.

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
    found = Allocation(space.resources.workers, worker, pool, at_once, total)
    return replace(found, idle=tuple(_idle(nodes, space, trials, found)))


def capacity(nodes: Sequence[Node], worker: Worker) -> int:
    """Workers that fit at once, each on one node, beside a CPU for the data on every node; where the nodes are too
    small for that, on one of them, where it costs the fewest workers."""
    room = sorted(nodes, key=lambda node: (node.cpus, node.gpus), reverse=True)
    beside = sum(_fits(node.cpus - DATA_CPUS, node.gpus, worker) for node in room)
    return beside or max(
        (
            sum(_fits(node.cpus - DATA_CPUS * (i == reserved), node.gpus, worker) for i, node in enumerate(room))
            for reserved in range(len(room))
        ),
        default=0,
    )


# -- below: how it is done


def _worker(nodes: Sequence[Node], wanted: Resources) -> Worker:
    """What a worker takes, with ``auto`` resolved: with GPUs as many CPUs as leave none of a node's GPUs without."""
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
    """Workers on one node. Ray shares a GPU among whole parts: of 0.3 each three fit on one."""
    if 0 < worker.gpus < 1:
        by_gpu = int(gpus) * int(1 / worker.gpus + 1e-9)
    else:
        by_gpu = int(gpus / worker.gpus + 1e-9) if worker.gpus else 10**6
    by_cpu = int(cpus / worker.cpus + 1e-9) if worker.cpus and math.isfinite(cpus) else 10**6
    return max(0, min(by_cpu, by_gpu))


def _too_large(nodes: Sequence[Node], worker: Worker, workers: int) -> str:
    has = ", ".join(f"{max(0.0, node.cpus - DATA_CPUS):g} CPUs and {node.gpus:g} GPUs" for node in nodes)
    lacking = "GPUs" if worker.gpus > sum(node.gpus for node in nodes) else "room"
    return (
        f"resources: a trial takes {workers} x ({worker.cpus:g} CPUs, {worker.gpus:g} GPUs), each on one node, but the "
        f"cluster lacks the {lacking}: its {len(nodes)} node{'s have' if len(nodes) > 1 else ' has'} {has}, beside "
        f"{DATA_CPUS} CPU for data; lower resources.workers, cpus_per_worker or gpus_per_worker"
    )


def _idle(nodes: Sequence[Node], space: SearchSpace, trials: int, found: Allocation) -> Iterator[str]:
    worker, per_trial = found.worker, max(1, found.workers)
    if found.total.gpus:
        used, total, unit = found.gpus_in_use, found.total.gpus, "GPUs"
    else:
        used, total, unit = found.trials_at_once * per_trial * worker.cpus, found.total.cpus, "cores"
    left = total - used
    if left < (0.05 if unit == "GPUs" else 1):
        return
    fits = found.pool // per_trial
    without_cpu_limit = sum(_fits(math.inf, node.gpus, worker) for node in nodes) // per_trial
    if unit == "GPUs" and not worker.gpus:
        reason = "resources.gpus_per_worker is 0"
    elif found.trials_at_once < fits and found.trials_at_once == trials:
        reason = f"there {'is one trial' if trials == 1 else f'are {trials} trials'} to run"
    elif found.trials_at_once < fits:
        reason = f"tune.concurrency is {space.tune.concurrency}"
    elif unit == "GPUs" and without_cpu_limit > fits:
        reason = f"a worker takes {worker.cpus:g} CPUs, and the nodes have no more; lower resources.cpus_per_worker"
    elif found.pool % per_trial:
        reason = f"a trial takes {per_trial} workers, and {found.pool} fit; change resources.workers"
    else:
        part = f"{worker.gpus:g} GPUs" if unit == "GPUs" else f"{worker.cpus:g} CPUs"
        reason = f"workers of {part} do not fill the nodes; change resources"
    yield f"{left:g} of {total:g} {unit} idle: {reason}"
