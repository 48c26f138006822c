"""Ray actors that share a list of jobs: what fits runs, a process that dies is started again, all is given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, Self, TypeVar

import ray
from rich.console import Console

from ser_ray import cluster
from ser_ray.allocation import Worker
from ser_ray.schema import ProcessDiedError, UserError

RESTARTS: Final = 3
"""An actor whose process dies is started again, and its job done again, so often."""

Name = TypeVar("Name", bound=Hashable)


class Pool:
    """Up to ``size`` actors, each holding one ``worker``'s resources, for the length of a ``with`` block.

    Jobs are handed to actors that are up, so that a pool works with what a busy cluster has room for. When the block
    ends, in order or not, the actors are killed and hold nothing any more.
    """

    def __init__(self, actor: Any, arguments: tuple[Any, ...], size: int, worker: Worker, console: Console) -> None:
        self.make = lambda: actor.options(
            num_cpus=worker.cpus,
            num_gpus=worker.gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",  # over all nodes
        ).remote(*arguments)
        self.size, self.worker, self.console = size, worker, console
        self.actors: list[Any] = []

    def __enter__(self) -> Self:
        self.actors = [self.make() for _ in range(self.size)]
        self.starting = {actor.__ray_ready__.remote(): actor for actor in self.actors}
        self.free: list[Any] = []
        return self

    def __exit__(self, *raised: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def map(self, jobs: Mapping[Name, Callable[[Any], Any]], what: str) -> Iterator[tuple[Name, Any]]:
        """Name -> a job, which is handed an actor -> the names and results, as they come.

        Raises UserError where a job did, or where its processes keep dying; ``what`` the jobs do, for that line.
        """
        waiting = list(jobs)
        running: dict[Any, tuple[Name, Any]] = {}
        told = time.monotonic()
        while waiting or running:
            while waiting and self.free:
                name, actor = waiting.pop(0), self.free.pop()
                running[jobs[name](actor)] = (name, actor)
            ready, _ = ray.wait([*self.starting, *running], num_returns=1, timeout=1.0)
            for ref in ready:
                result = _result(ref, what)
                if ref in running:
                    name, actor = running.pop(ref)
                    yield name, result
                else:
                    actor = self.starting.pop(ref)
                self.free.append(actor)
            if not running and not self.free and time.monotonic() - told > cluster.PATIENCE_S:
                told = time.monotonic()
                self.console.print(
                    f"  {what}: waiting for {self.worker.cpus:g} CPUs and {self.worker.gpus:g} GPUs on one node; "
                    "other work holds the cluster"
                )


# -- below: how it is done


def _result(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = cluster.user_error(error)
        if isinstance(cause, ProcessDiedError):
            raise UserError(
                f"{what}: {cause} ({RESTARTS + 1} times); where memory is short, raise resources.cpus_per_worker, so "
                "that fewer work on a node"
            ) from error
        raise cause or error from None
