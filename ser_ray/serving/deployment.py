"""The server on Ray Serve: one `Front` that speaks HTTP, and replicas of `Models` that answer in batches.

Of Ray 2.60's ``serve.batch`` two things matter here. It does not wait for the batch that is being computed: what
arrives meanwhile becomes batches of what came within ``batch_wait_timeout_s`` of each other, of one request each where
that is 0. So requests wait in `Models` until the model is free, and enter together. And a request that does not fit
into a batch goes to the back of the queue, where it could be passed over for ever; but here only those that entered
together are in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ser_ray.models.precision import choose_device
from ser_ray.runtime import cluster, private
from ser_ray.runtime.allocation import DATA_CPUS
from ser_ray.schema import UserError
from ser_ray.serving import answering
from ser_ray.serving.answering import BATCH_SECONDS, Job, Known, Reply
from ser_ray.serving.app import make_app
from ser_ray.serving.keys import read_keys
from ser_ray.serving.limits import Refused
from ser_ray.serving.loaded import LoadedModels
from ser_ray.serving.settings import Settings, cpus_of_replica, most_replicas

NAME: Final = "ser-ray"
"""Of the application."""
TARGET: Final = 16
"""Jobs under way for each replica, above which another replica is started: up to there a larger batch answers them in
little more time."""
HEALTH_S: Final = 2.0
"""Seconds between two looks at whether a replica is alive: so long a killed one is missed at most."""

AGAIN_S: Final = 0.2
"""Seconds until a request that met a dead replica is asked again: Ray notices the death in about as long."""


class Models:
    """The checkpoints in one process, which answers the jobs of many clients in batches by padded seconds."""

    def __init__(self, settings: Settings, threads: int) -> None:
        _guard_port()
        torch.set_num_threads(threads)
        device = choose_device(len(ray.get_gpu_ids()))
        self.loaded = LoadedModels(settings.checkpoints, settings.limits.models, device)
        self.loaded.get(next(iter(settings.checkpoints)))
        self.batched = settings.batched
        # The event loop stays free for jobs that arrive, and they have their model before the batch has ended.
        self.computing, self.loading = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.inside = 0
        """Jobs that are in ``serve.batch``."""
        self.free = asyncio.Event()
        """Set while no batch is being computed."""
        self.free.set()

    async def answer(self, job: Job) -> Reply | Refused:
        """A reply to a job, or why there is none."""
        try:
            known = answering.known_of(job, await _in(self.loading, self.loaded.get, job.model))
            if self.batched:
                return await self._with_others(known)
            replies: list[Reply] = await _in(self.computing, answering.answer, [known])
            return replies[0]
        except UserError as error:
            return Refused(503, str(error))
        except Refused as refused:
            return refused

    async def enrol(self, model: str, windows: Sequence[np.ndarray], name: str) -> dict[str, Any] | Refused:
        """The voice of the one speaker of all windows, or why there is none."""
        try:
            loaded = await _in(self.loading, self.loaded.get, model)
            voice: dict[str, Any] = await _in(self.computing, answering.enrolled, loaded, windows, name)
            return voice
        except UserError as error:
            return Refused(503, str(error))
        except Refused as refused:
            return refused

    async def is_ready(self) -> bool:
        """A model is loaded, or this replica would not be there."""
        return True

    async def _with_others(self, known: Known) -> Reply:
        while not self.free.is_set():
            await self.free.wait()
        self.inside += 1
        try:
            reply: Reply = await self._batch(known)
            return reply
        finally:
            self.inside -= 1
            if not self.inside:
                self.free.set()

    @serve.batch(max_batch_size=BATCH_SECONDS, batch_wait_timeout_s=0, batch_size_fn=answering.padded_seconds)
    async def _batch(self, known: list[Known]) -> list[Reply]:
        self.free.clear()
        replies: list[Reply] = await _in(self.computing, answering.answer, known)
        return replies


class Front:
    """HTTP: keys, limits, decoding; it has no model."""

    def __init__(self, settings: Settings, models: DeploymentHandle) -> None:
        _guard_port()
        self.settings, self.models = settings, models

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings = self.settings
        keys = read_keys(Path(settings.key_file) if settings.key_file else None, settings.host)
        return make_app(settings, Replicas(self.models), keys)


class Replicas:
    """`service.Backend` by Ray Serve. What was with a replica that dies is given to another one, once."""

    def __init__(self, models: DeploymentHandle) -> None:
        self.models = models

    async def answer(self, job: Job) -> Reply:
        """See `service.Backend`."""
        reply: Reply = await self._asked(lambda: self.models.answer.remote(job))
        return reply

    async def enrol(self, model: str, windows: Sequence[np.ndarray], name: str) -> dict[str, Any]:
        """See `service.Backend`."""
        voice: dict[str, Any] = await self._asked(lambda: self.models.enrol.remote(model, list(windows), name))
        return voice

    async def is_ready(self) -> bool:
        """See `service.Backend`."""
        try:
            return bool(await asyncio.wait_for(self._asked(lambda: self.models.is_ready.remote()), HEALTH_S))
        except (TimeoutError, Refused):
            return False

    async def _asked(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """An answer. Until Ray has noticed the end of a replica it may send a request there again, which was not begun
        then: what counts is how many have ended. The caller has a limit of time."""
        ended: set[str | None] = set()
        while len(ended) < 2:
            try:
                answer = await ask()
            except RayActorError as error:
                if error.actor_id in ended:
                    await asyncio.sleep(AGAIN_S)
                ended.add(error.actor_id)
                continue
            except (BackPressureError, DeploymentUnavailableError):
                raise Refused(503, "the model is not there, or has too much to do", 5) from None
            if isinstance(answer, Refused):
                raise answer
            return answer
        raise Refused(503, "two processes of the model ended with this request", 5)


def application(arguments: Settings | dict[str, Any]) -> serve.Application:
    """The application of ``ser-ray serve``, and of a configuration file that ``serve deploy`` reads."""
    settings = Settings.model_validate(arguments)
    total = ray.cluster_resources()
    cores = int(total.get("CPU", 1) - DATA_CPUS * total.get(cluster.OWN, 0))
    gpus = int(total.get("GPU", 0))
    cpus = cpus_of_replica(cores)
    replicas: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.replicas is None:
        most = most_replicas(cores, gpus)
        replicas = {"autoscaling_config": {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": TARGET}}
    models = serve.deployment(
        Models,
        name="Models",
        ray_actor_options={"num_cpus": 0 if gpus else cpus, "num_gpus": 1 if gpus else 0},
        max_ongoing_requests=max(settings.limits.queue, BATCH_SECONDS),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=5,
        **replicas,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        ray_actor_options={"num_cpus": 0},  # one core is left to it; see settings.cpus_of_replica
        # Above what `Room` lets in, so that it is `Room` who refuses, in JSON.
        max_ongoing_requests=4 * (settings.limits.queue + settings.limits.connections),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=5,
    )
    return front.bind(settings, models.bind(settings, cpus))


# -- below: how it is done


def _guard_port() -> None:
    """On one machine this replica is reached from nowhere else; on a cluster it has to be."""
    if cluster.is_own():
        private.serve_on_loopback()


async def _in(thread: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
