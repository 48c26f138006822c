"""Start or join Ray (the project's only ``ray.init``), allocate its resources to trials, and resolve paths."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
from rich.console import Console

from ser_ray.config import SearchSpace
from ser_ray.runtime import allocation, nodes, private, sharing
from ser_ray.runtime.allocation import DATA_CPUS, Allocation, Node, Worker
from ser_ray.schema import UserError

OWN = "ser_ray_started"
"""A resource that marks the node whose Ray this project started: it declares one CPU more than exists, for the data."""

RAYS_OWN_PORTS = frozenset({6379, 8265, 10001, 44217, 44227, 52365})
"""Default ports of Ray's components; 52365, the dashboard agent's, is one that the system may assign to any program."""
PATIENCE_S = 20.0
"""Seconds of waiting before a line says what is waited for: a process that has its resources may take ten to start."""
LOOK_S = 10.0
"""The same where it is known that nothing was given yet: about when a user wonders if a command hangs."""
REPEAT_S = 60.0
"""Seconds until the line comes again: other work may hold a cluster for hours."""
ANSWERS_WITHIN_S = 10.0
"""How long to try to reach a cluster that should be up: Ray would try for minutes."""
SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103
"""Maximum bytes of a socket's path: sun_path has one byte more, for the terminator (unix(7)); macOS has four less."""
LONGEST_SOCKET = "dash_TaskEventsHead"
"""The longest name of a socket of Ray 2.60, below a session's folder: the dashboard's module for task events."""
VERBOSE = "SER_RAY_VERBOSE"
"""If this is set (by ``--verbose``), Ray's own logs are shown."""

# Ray's defaults slow down short trials. The health check is also the poll that notices the end of a run: with its
# default of 2 s a trial of three empty epochs takes twice as long.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own state is never read
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to Ray's makers over the network, by a process that is not needed
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output is silent with verbose=0
    "TOKENIZERS_PARALLELISM": "false",
}


_joined = False
"""Whether `connect` has joined Ray, not the program that calls it."""


def connect(space: SearchSpace | None = None) -> None:
    """Join the cluster of RAY_ADDRESS or ``ray start``, else start one on this machine, unless that is done already.

    A Ray started here declares one CPU more than the machine has, for the data tasks, which mostly wait: so one core
    is enough for a search. Then waits for all expected nodes, and with a ``space`` checks each of them.

    Raises UserError where no cluster answers, or where `nodes.wait` or `nodes.check` does.
    """
    if not ray.is_initialized():
        _join()
    nodes.wait()
    if space is not None:
        nodes.check(space)


def _join() -> None:
    global _joined
    verbose = VERBOSE in os.environ
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    offered = _offered()
    if offered is None:
        _check_sockets_fit()
        cpus = _cores()
        # A nested trial has several small processes; Ray would otherwise warn about them as if they were a leak.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, cpus)))
        # Without a process for every CPU at the start: a command would wait for them, on a busy machine for ever (Ray's
        # issue 40131), and not all of them are used.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ["RAY_GCS_SERVER_PORT"] = port = str(_free_port())
        address = f"127.0.0.1:{port}"
        options: dict[str, Any] = {
            "address": "local",
            "num_cpus": cpus + DATA_CPUS,
            "resources": {OWN: 1},
            "include_dashboard": verbose,  # three processes, for who looks at Ray itself
            "dashboard_host": "127.0.0.1",
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": str(private.own_directory(_system_temp())),
        }
    else:
        address, options = offered, {"address": offered}
    # Every process of ours gets the address of its cluster. Ray Train's cleaner, which frees the workers of a stopped
    # trial, reads it from this variable; if it is not set and two clusters run on a machine, the cleaner gives up.
    variables = {key: os.environ[key] for key in _ENVIRONMENT} | {"RAY_ADDRESS": address}
    if offered is None:
        os.environ["RAY_ADDRESS"] = address  # inherited; with a runtime environment every worker would start twice
    else:
        options["runtime_env"] = {"env_vars": variables}
    private.guard_token()
    try:
        with private.on_loopback() if offered is None else contextlib.nullcontext():
            ray.init(logging_level="INFO" if verbose else "ERROR", log_to_driver=verbose, **options)
    except ConnectionError:
        raise UserError(
            f"{address}: no Ray cluster answers us; start it, unset RAY_ADDRESS, or set RAY_AUTH_MODE=token where it "
            "asks for a token"
        ) from None
    finally:
        if offered is None:
            del os.environ["RAY_ADDRESS"]
    _joined = True
    _install_signal_handlers()
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:  # hides Ray's own progress; `ser_ray.runtime.watch` reports what fails in Tune
        for name, level in (("data", logging.ERROR), ("train", logging.ERROR), ("tune", logging.CRITICAL)):
            logging.getLogger(f"ray.{name}").setLevel(level)


def leave() -> bool:
    """Leave the Ray that `connect` joined; one that it started ends. False, and nothing is done, where this process was
    in a Ray before: what else it has there is not ours to end."""
    if not _joined:
        return False
    ray.shutdown()
    return True


def is_own() -> bool:
    """Whether this project started the Ray that this process is in, so that all of it is on this machine."""
    return OWN in ray.cluster_resources()


def is_up() -> bool:
    """Whether the Ray that this process joined still answers; False too when it was left."""
    return ray.is_initialized() and _answers(ray.get_runtime_context().gcs_address, within_s=0.0)


def describe() -> str:
    """One line on the cluster: nodes, cores, GPUs."""
    total, alive = ray.cluster_resources(), nodes.alive()
    count, gpus = len(alive), total.get("GPU", 0)
    cores = total.get("CPU", 0) - DATA_CPUS * sum(node["Resources"].get(OWN, 0) for node in alive)
    return f"{count} node{'s' * (count != 1)}, {cores:g} core{'s' * (cores != 1)}, {gpus:g} GPU{'s' * (gpus != 1)}"


def waiting_for(wanted: str) -> str:
    """A line that says what is waited for, and how much of the cluster is free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    cpus, gpus = (f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    return f"waiting for {wanted}; {cpus} and {gpus} are free, other work holds the rest"


def wait_for_room(worker: Worker, count: int, wanted: str, console: Console) -> None:
    """Wait until the cluster has room for ``count`` workers at once; after a while, and then again, say so.

    The room is not kept: it is for a call of Ray that would wait without a line, and not end with Ctrl-C.
    """
    resources = {"CPU": worker.cpus, "GPU": worker.gpus}
    group = ray.util.placement_group([{name: amount for name, amount in resources.items() if amount}] * count)
    try:
        _wait(lambda: group.wait(timeout_seconds=1), LOOK_S, wanted, console)
    finally:
        ray.util.remove_placement_group(group)


def trainers_waiting(workers: int) -> int:
    """How many trainers of this command wait for room on the cluster for their ``workers``. Ray Train requests the
    resources of all workers as one placement group, and the id of a placement group ends with the id of its job."""
    job = ray.get_runtime_context().get_job_id()
    groups = ray.util.placement_group_table().items()
    waiting = [group for name, group in groups if name.endswith(job) and group["state"] == "PENDING"]
    return sum(len(group["bundles"]) == workers for group in waiting)


def allocate(space: SearchSpace, trials: int, console: Console, share: bool = False) -> Allocation:
    """How ``trials`` of a space share this cluster, with the device and precision of their workers.

    ``share``: ``gpus_per_worker: auto`` may put several trials on a GPU (`ser_ray.runtime.sharing`), for which a step
    is measured on one. Raises UserError where not even one trial fits.
    """
    offers = [node["Resources"] for node in nodes.alive()]
    offered = [Node(o.get("CPU", 0.0), o.get("GPU", 0.0)) for o in offers]
    whole = allocation.allocate(offered, space, trials)
    if not whole.worker.gpus:
        return whole
    cuda, precision = _device(whole.worker, console)
    if not (share and cuda and space.resources.gpus_per_worker == "auto"):
        return dataclasses.replace(whole, cuda=cuda, precision=precision)
    gpus, reason = sharing.chosen(space, offered, trials, partial(_measured, console=console))
    resources = space.resources.model_copy(update={"gpus_per_worker": gpus})
    shared = allocation.allocate(offered, space.model_copy(update={"resources": resources}), trials)
    return dataclasses.replace(shared, cuda=cuda, precision=precision, sharing=reason)


def allocate_here() -> Allocation:
    """The allocation of a trial in this process."""
    return allocation.here(*_look_at_device(), cpus=float(_cores()))


# -- below: how it is done


def _cores() -> int:
    """CPU cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(worker: Worker, console: Console) -> tuple[bool, str]:
    """Whether a worker sees a CUDA device, and what ``precision: auto`` resolves to there.

    If the driver sees none, a task with the GPUs of a worker looks: GPUs declared to Ray may not exist.
    """
    if (own := _look_at_device())[0]:
        return own
    answer: tuple[bool, str] = _on_gpus(worker.gpus, console, _look_at_device)
    return answer


def _measured(space: SearchSpace, console: Console) -> sharing.Footprint:
    """`sharing.measured`, by a process that ends with it: what it holds of the GPU is free for the trials."""
    console.print("resources.gpus_per_worker: auto; measuring the memory of a step on a GPU")
    footprint: sharing.Footprint = _on_gpus(1.0, console, sharing.measured, space)
    return footprint


def _on_gpus(gpus: float, console: Console, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own that holds so many GPUs; says if it has to wait for them."""
    asked = ray.remote(num_cpus=0, num_gpus=gpus, max_calls=1)(function).remote(*arguments)
    _wait(lambda: bool(ray.wait([asked], timeout=1)[0]), PATIENCE_S, f"{gpus:g} GPUs", console)
    return ray.get(asked)


def _wait(looks: Callable[[], bool], patience: float, wanted: str, console: Console) -> None:
    """Until ``looks``, which takes a second at most, finds that it is there; after ``patience``, and then again, say
    what is waited for."""
    next_line = time.monotonic() + patience
    while not looks():
        if time.monotonic() > next_line:
            console.print(f"  ... {waiting_for(wanted)}")
            next_line = time.monotonic() + REPEAT_S


def _look_at_device() -> tuple[bool, str]:
    import torch

    from ser_ray.models import precision

    device = precision.choose_device()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return device.type == "cuda", names[precision.compute_dtype("auto", device)]


def _offered() -> str | None:
    """The address of a running cluster, from RAY_ADDRESS or from ``ray start`` on this machine; None without either.

    Ray's own "auto" would also join the private Ray of any other command that runs here. Raises UserError where nothing
    answers there: Ray itself would try for minutes.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named not in ("", "auto"):
        if not _answers(named):
            raise UserError(f"{named}: no Ray cluster answers; start it, or unset RAY_ADDRESS")
        return named
    started = _system_temp() / "ray" / "ray_current_cluster"
    if not started.is_file():
        return named or None
    if started.is_symlink() or started.stat().st_uid != os.getuid():  # by a link anybody could name a file of ours
        raise UserError(
            f"{started}: belongs to the Ray of another user; set RAY_TMPDIR to a directory of your own, or RAY_ADDRESS "
            "to the cluster to join"
        )
    address = started.read_text(encoding="utf-8").strip()
    if not _answers(address):
        raise UserError(
            f"{started}: names a Ray at {address or 'no address'}, where none answers; remove the file, or start that "
            "Ray again"
        )
    return address


def _system_temp() -> Path:
    """Where Ray keeps its sessions, by Ray's own rule (``ray._common.utils.get_default_system_temp_dir``)."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"))  # noqa: S108 (Ray's own)


def _answers(address: str, within_s: float = ANSWERS_WITHIN_S) -> bool:
    """Whether a Ray listens at ``address``; tried for a while, as a cluster may just be starting."""
    host, _, port = address.rpartition(":")
    if not address or "://" in address or not port.isdigit():
        return bool(address)  # an address in Ray's own terms, such as local: left to Ray
    ends = time.monotonic() + within_s
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                return _speaks_grpc(connection)
        except OSError:
            if time.monotonic() > ends:
                return False
            time.sleep(0.2)


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether a gRPC server answers, not another program that got the port since: gRPC servers begin with a SETTINGS
    frame (RFC 9113, 3.4)."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    return connection.recv(9)[3:4] == b"\4"


def _check_sockets_fit() -> None:
    """Raises UserError where the paths of Ray's sockets would be longer than the system allows."""
    temp = _system_temp()
    own = temp / f"ser_ray-{os.getuid()}" / "ray"
    longest = own / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / LONGEST_SOCKET
    over = len(os.fsencode(longest)) - SOCKET_BYTES
    if over > 0:
        raise UserError(
            f"{temp}: too long by {over} bytes for the sockets that Ray makes below it; set RAY_TMPDIR, or TMPDIR, to "
            "a shorter directory, such as /tmp"
        )


def _install_signal_handlers() -> None:
    """Make SIGTERM, and SIGUSR1, which Slurm sends before the time limit, end a command cleanly, as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    # A background job of a script rightly ignores Ctrl-C, but this signal was sent to it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # for the current handler: Ray Tune installs its own


def _free_port() -> int:
    """A port that nothing listens on and that is not a default of another component of Ray."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        if port not in RAYS_OWN_PORTS:
            return port
