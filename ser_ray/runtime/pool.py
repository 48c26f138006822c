"""A pool of Ray actors for a list of jobs: uses the free resources, restarts dead processes, frees all at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final, Self, TypeVar

import ray
from rich.console import Console

from ser_ray.runtime import cluster, failures
from ser_ray.runtime.allocation import Worker
from ser_ray.runtime.contact import Contact
from ser_ray.schema import ProcessDiedError, UserError

RESTARTS: Final = 3
"""How often an actor whose process dies is restarted and its job repeated."""
GROWS_AFTER_S: Final = 8.0
"""Seconds that jobs wait for the first actor of a pool that grows: as long as another takes to start, most of it
importing torch and transformers. Where all is done by then, as in the evaluation of a small corpus, one was enough."""

Name = TypeVar("Name", bound=Hashable)


class Pool:
    """Up to ``size`` actors, each with the resources of one ``worker``, for the duration of a ``with`` block.

    Jobs go to the actors that are up, so that a pool works with what a busy cluster has room for. When the block ends,
    by an exception or not, the actors are killed and their resources are free again.

    ``grows``, where it is not known how long the jobs take: one actor is started, and the others when jobs have waited
    for it for `GROWS_AFTER_S`, in all calls of `map` together.
    """

    def __init__(
        self,
        actor: Any,
        arguments: tuple[Any, ...],
        size: int,
        worker: Worker,
        console: Console,
        grows: bool = False,
    ) -> None:
        self.make = lambda: actor.options(
            num_cpus=worker.cpus,
            num_gpus=worker.gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",  # over all nodes
        ).remote(*arguments)
        self.size, self.worker, self.console, self.grows = size, worker, console, grows
        self.actors: list[Any] = []

    def __enter__(self) -> Self:
        self.starting: dict[Any, Any] = {}
        self.free: list[Any] = []
        self.waited_s = 0.0
        self._grow_to(1 if self.grows else self.size)
        return self

    def __exit__(self, *raised: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def map(self, jobs: Mapping[Name, Callable[[Any], Any]], what: str) -> Iterator[tuple[Name, Any]]:
        """Run named jobs, functions of an actor; yields names and results as they arrive.

        Raises UserError where a job did, or where its processes keep dying, LostMessageError where Ray tells nothing
        any more. ``what``: what the jobs do, for messages.
        """
        contact = Contact()
        waiting = list(jobs)
        running: dict[Any, tuple[Name, Any]] = {}
        next_line = time.monotonic() + cluster.PATIENCE_S
        while waiting or running:
            while waiting and self.free:
                name, actor = waiting.pop(0), self.free.pop()
                running[jobs[name](actor)] = (name, actor)
            if waiting and self.waited_s > GROWS_AFTER_S:
                self._grow_to(min(self.size, len(waiting) + len(running)))
            before = time.monotonic()
            ready, _ = ray.wait([*self.starting, *running], num_returns=1, timeout=1.0)
            if waiting and running:
                self.waited_s += time.monotonic() - before
            contact.check()
            for ref in ready:
                result = _result(ref, what)
                if ref in running:
                    name, actor = running.pop(ref)
                    yield name, result
                else:
                    actor = self.starting.pop(ref)
                self.free.append(actor)
            if not running and not self.free and time.monotonic() > next_line:
                next_line = time.monotonic() + cluster.REPEAT_S
                wanted = f"{self.worker.cpus:g} CPUs and {self.worker.gpus:g} GPUs on one node"
                self.console.print(f"  {what}: {cluster.waiting_for(wanted)}")

    def _grow_to(self, size: int) -> None:
        for _ in range(size - len(self.actors)):
            self.actors.append(self.make())
            self.starting[self.actors[-1].__ray_ready__.remote()] = self.actors[-1]


# -- below: how it is done


def _result(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        cause = failures.user_error(error)
        if isinstance(cause, ProcessDiedError):
            raise UserError(
                f"{what}: {cause} ({RESTARTS + 1} times); if memory is short, raise resources.cpus_per_worker, so "
                "that fewer workers run on a node"
            ) from error
        raise cause or error from None
