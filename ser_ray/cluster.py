"""Ray, started or joined in one place: the only ``ray.init`` of the project, what fits on it, where paths lead."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from rich.console import Console

from ser_ray import __version__, allocation, disk, nodes
from ser_ray.allocation import DATA_CPUS, Allocation, Node, Worker
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.corpora import table
from ser_ray.schema import MemoryShortageError, ProcessDiedError, StorageError, UserError
from ser_ray.speech import shards

OWN = "ser_ray_started"
"""A resource of the one node whose Ray this project started: it was told of a CPU more than there are, for the data."""

RAYS_OWN_PORTS = frozenset({6379, 8265, 10001, 44217, 44227, 52365})
"""Defaults of its components; 52365, the dashboard agent's, is among the ports that the system gives away."""
PATIENCE_S = 20.0
"""After so long, and then every so often, a line says what is waited for."""
ANSWERS_WITHIN_S = 10.0
"""So long somebody is asked who should be there: Ray would ask for minutes."""
SOCKET_BYTES = 107 if sys.platform.startswith("linux") else 103
"""The longest path of a socket: sun_path has a byte more, for the end (unix(7)); of macOS four less."""
LONGEST_SOCKET = "dash_TaskEventsHead"
"""Of what Ray 2.60 names its sockets, below the folder of a session: the dashboard's part for events of tasks."""
VERBOSE = "SER_RAY_VERBOSE"
"""Where this is set (by ``--verbose``) Ray's own logs are shown."""

# What Ray's defaults cost a short trial. The health check is also the poll that notices the end of a run: at its
# default of 2 s a trial of three empty epochs takes twice as long.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own notes are never read
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one is silent when told to be
    "TOKENIZERS_PARALLELISM": "false",
}


_DIED = re.compile(
    r"The (actor|worker) died unexpectedly|The actor is dead|The actor \w+ is unavailable"
    r"|the node it was running on is dead|local raylet died"
)
"""What Ray 2.60 says of a process that was ended from outside."""
_PACKAGES = ("torch", "torchaudio", "transformers", "peft", "bitsandbytes", "ray", "optuna", "pyarrow", "scikit-learn")


def connect(space: SearchSpace | None = None) -> None:
    """Join the cluster that RAY_ADDRESS or ``ray start`` offers, else start one on this machine; again: nothing.

    On its own machine Ray is told of one CPU more than there are, for the data tasks, which mostly wait: so one core
    is enough for a search. A cluster is waited for, and with a ``space`` every node of it is looked at.

    Raises UserError where no cluster answers, or `nodes.wait` and `nodes.check` do.
    """
    if not ray.is_initialized():
        _join()
    nodes.wait()
    if space is not None:
        nodes.check(space)


def _join() -> None:
    verbose = VERBOSE in os.environ
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    offered = _offered()
    if offered is None:
        _check_sockets_fit()
        cpus = _cores()
        # A nested trial is several small processes, which Ray otherwise warns about as if they were a leak.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, cpus)))
        os.environ["RAY_GCS_SERVER_PORT"] = port = str(_free_port())
        address = f"127.0.0.1:{port}"
        options: dict[str, Any] = {
            "address": "local",
            "num_cpus": cpus + DATA_CPUS,
            "resources": {OWN: 1},
            "dashboard_host": "127.0.0.1",
        }
    else:
        address, options = offered, {"address": offered}
    # Every process of ours is told which cluster is its own. What frees the workers of a trial that was stopped (Ray
    # Train's cleaner) asks for it by this variable, and gives up where it is not set and two clusters run on a machine.
    variables = {key: os.environ[key] for key in _ENVIRONMENT} | {"RAY_ADDRESS": address}
    if offered is None:
        os.environ["RAY_ADDRESS"] = address  # inherited; by a runtime environment every worker would start twice
    else:
        options["runtime_env"] = {"env_vars": variables}
    try:
        ray.init(logging_level="INFO" if verbose else "ERROR", log_to_driver=verbose, **options)
    except ConnectionError:
        raise UserError(
            f"{address}: no Ray cluster answers us; start it, unset RAY_ADDRESS, or set RAY_AUTH_MODE=token where it "
            "asks for a token"
        ) from None
    finally:
        if offered is None:
            del os.environ["RAY_ADDRESS"]
    _install_signal_handlers()
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:  # their progress is Ray's own, ours is for people; and `ser_ray.watch` says what fails in Tune
        for name, level in (("data", logging.ERROR), ("train", logging.ERROR), ("tune", logging.CRITICAL)):
            logging.getLogger(f"ray.{name}").setLevel(level)


def describe() -> str:
    """One line on the cluster: nodes, cores, GPUs."""
    total, alive = ray.cluster_resources(), nodes.alive()
    count, gpus = len(alive), total.get("GPU", 0)
    cores = total.get("CPU", 0) - DATA_CPUS * sum(node["Resources"].get(OWN, 0) for node in alive)
    return f"{count} node{'s' * (count != 1)}, {cores:g} core{'s' * (cores != 1)}, {gpus:g} GPU{'s' * (gpus != 1)}"


def allocate(space: SearchSpace, trials: int, console: Console) -> Allocation:
    """How ``trials`` of a space share this cluster, and what their workers find on it.

    Raises UserError where not even one trial fits.
    """
    offers = [node["Resources"] for node in nodes.alive()]
    found = allocation.allocate([Node(o.get("CPU", 0.0), o.get("GPU", 0.0)) for o in offers], space, trials)
    if not found.worker.gpus:
        return found
    cuda, precision = _device(found.worker, console)
    return dataclasses.replace(found, cuda=cuda, precision=precision)


def allocate_here() -> Allocation:
    """The same for a trial in this process."""
    return allocation.here(*_look_at_device(), cpus=float(_cores()))


def user_error(error: BaseException, where: object = "") -> UserError | None:
    """The UserError behind what Ray raises when a process of ours failed, if there is one; a StorageError where that
    process could not write its files, which are ``where`` if the error does not say it; a ProcessDiedError where it
    was ended from outside."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            kinds = (StorageError, MemoryShortageError, ProcessDiedError, UserError)
            return next(kind for kind in kinds if isinstance(cause, kind))(str(cause).splitlines()[-1])
        if isinstance(cause, OSError) and (line := disk.explain(cause, where)):
            return StorageError(line)
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, RayError) and (line := death(f"{type(error).__module__}.{type(error).__name__}: {error}")):
        return ProcessDiedError(line)
    return None


def death(text: str) -> str | None:
    """A line for people where Ray's ``text`` says that a process was ended from outside, None where it says no such
    thing."""
    if any(words in text for words in ("running low on memory", "ray.exceptions.OutOfMemoryError")):
        return (
            "Ray ended its process, as the memory of its machine was nearly full; lower tune.concurrency or "
            "experiment.batch_seconds, or use a machine with more memory"
        )
    return "its process died" if _DIED.search(text) else None


def resolve_paths(space: SearchSpace) -> SearchSpace:
    """The same space with absolute paths, as workers run in other directories.

    Inside a ``ray job submit`` the current directory is a copy that vanishes with the job: results then go to
    ``~/ser_ray/results`` unless said otherwise, and relative data or storage paths are refused with a UserError.
    """
    storage = space.storage
    if _submitted_job():
        for key in storage.model_fields_set & {"results", "cache"}:
            _refuse_relative(f"storage.{key}", getattr(storage, key))
        for corpus, directory in space.experiment.corpora.items():
            _refuse_relative(f"experiment.corpora.{corpus}", directory)
        if _is_file(given := space.experiment.protocol.given):
            _refuse_relative("experiment.protocol.given", str(given))
        if "results" not in storage.model_fields_set:
            storage = storage.model_copy(update={"results": "~/ser_ray/results"})
    storage = storage.model_copy(update={"results": _absolute(storage.results), "cache": _absolute(storage.cache)})
    search = {key: _resolve_conditions(distribution) for key, distribution in space.search.items()}
    if "backbone" in search and search["backbone"].choice is not None:
        choice = tuple(_absolute_backbone(name) for name in search["backbone"].choice)
        search["backbone"] = search["backbone"].model_copy(update={"choice": choice})
    first = tuple(
        {key: _absolute_backbone(value) if key == "backbone" else value for key, value in point.items()}
        for point in space.tune.first
    )
    return space.model_copy(
        update={
            "experiment": _resolve_experiment(space.experiment),
            "storage": storage,
            "search": search,
            "tune": space.tune.model_copy(update={"first": first}),
        }
    )


def provenance(space: SearchSpace, shard_dirs: list[Path], argv: list[str]) -> dict[str, Any]:
    """What made a result: code, command, packages, hardware, data, seed; as it goes into provenance.json."""
    import torch  # here, so that a worker that only prepares data need not load it

    manifests = {str(directory): shards.read_manifest(directory) for directory in shard_dirs}
    return {
        "version": __version__,
        "git": _git_commit(),
        "argv": argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": None,
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "seed": space.experiment.seed,
        "data": [
            {"corpus": manifest["corpus"], "directory": directory, "fingerprint": manifest["content_sha256"]}
            | {key: manifest[key] for key in ("utterances", "hours")}
            | {"rejected": len(manifest["rejected"])}
            for directory, manifest in manifests.items()
        ],
    }


# -- below: how it is done


def _cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(worker: Worker, console: Console) -> tuple[bool, str]:
    """Whether a worker sees a CUDA device, and what ``precision: auto`` is there; asked on one, where the driver has
    none itself. GPUs may be declared to Ray that are not there."""
    if (own := _look_at_device())[0]:
        return own
    asked = ray.remote(_look_at_device).options(num_cpus=0, num_gpus=worker.gpus).remote()
    while not ray.wait([asked], timeout=PATIENCE_S)[0]:
        console.print(f"waiting for {worker.gpus:g} GPUs: other work holds those of the cluster")
    answer: tuple[bool, str] = ray.get(asked)
    return answer


def _look_at_device() -> tuple[bool, str]:
    import torch

    from ser_ray.models import precision

    cuda = torch.cuda.is_available()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return cuda, names[precision.compute_dtype("auto", "cuda" if cuda else "cpu")]


def _offered() -> str | None:
    """The cluster that somebody offers: by RAY_ADDRESS, or by ``ray start`` on this machine.

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
    if started.stat().st_uid != os.getuid():
        raise UserError(
            f"{started}: belongs to the Ray of another user; set RAY_TMPDIR to a directory of your own, or RAY_ADDRESS "
            "to the cluster that is meant"
        )
    address = started.read_text(encoding="utf-8").strip()
    if not _answers(address):
        raise UserError(
            f"{started}: names a Ray at {address or 'no address'}, where none answers; remove the file, or start that "
            "Ray again"
        )
    return address


def _system_temp() -> Path:
    """Where Ray keeps its sessions, as it looks for it (``ray._common.utils.get_default_system_temp_dir``)."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"))  # noqa: S108 (Ray's own)


def _answers(address: str) -> bool:
    """Whether somebody listens there; asked for a while, as a cluster may just be starting."""
    host, _, port = address.rpartition(":")
    if not address or "://" in address or not port.isdigit():
        return bool(address)  # Ray's own words for where it is, such as local; Ray knows
    ends = time.monotonic() + ANSWERS_WITHIN_S
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                return _speaks_grpc(connection)
        except OSError:
            if time.monotonic() > ends:
                return False
            time.sleep(0.2)


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether it is no other program that was given the port since: a server of gRPC begins with a frame of settings
    (RFC 9113, 3.4)."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    return connection.recv(9)[3:4] == b"\4"


def _check_sockets_fit() -> None:
    """Raises UserError where the paths of Ray's sockets would be longer than the system takes."""
    temp = _system_temp()
    longest = temp / "ray" / f"session_2000-01-01_00-00-00_000000_{os.getpid()}" / "sockets" / LONGEST_SOCKET
    over = len(os.fsencode(longest)) - SOCKET_BYTES
    if over > 0:
        raise UserError(
            f"{temp}: too long by {over} bytes for the sockets that Ray makes below it; set RAY_TMPDIR, or TMPDIR, to "
            "a shorter directory, such as /tmp"
        )


def _install_signal_handlers() -> None:
    """SIGTERM, and SIGUSR1 as Slurm sends it before the time limit, end a command as Ctrl-C does: in order."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    # A job that a script runs in the background ignores Ctrl-C, as it should; this was meant for it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # for whoever heeds it now: Ray Tune has a handler of its own


def _free_port() -> int:
    """One that nobody listens on, nor another part of Ray will."""
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        if port not in RAYS_OWN_PORTS:
            return port


def _git_commit() -> str | None:
    """The commit of the checkout that runs, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None


def _resolve_experiment(experiment: Experiment) -> Experiment:
    corpora = {name: path and _absolute(path) for name, path in experiment.corpora.items()}
    for name, path in corpora.items():
        if path and not Path(path).is_dir() and not (path.endswith(table.SUFFIXES) and Path(path).is_file()):
            raise UserError(f"experiment.corpora.{name}: {path}: no such directory; set it to where the corpus lies")
    protocol = experiment.protocol
    if _is_file(protocol.given):
        protocol = protocol.model_copy(update={"given": _absolute(str(protocol.given))})
    backbone = _absolute_backbone(experiment.backbone)
    return experiment.model_copy(update={"corpora": corpora, "protocol": protocol, "backbone": backbone})


def _is_file(given: object) -> bool:
    """Whether ``protocol.given`` is a table of folds."""
    return isinstance(given, str) and given.endswith(".csv")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _resolve_conditions(distribution: Distribution) -> Distribution:
    """The backbones of its ``when`` as they then stand in the choice."""
    when = distribution.when
    if "backbone" not in when:
        return distribution
    names = tuple(_absolute_backbone(name) for name in when["backbone"])
    return distribution.model_copy(update={"when": {**when, "backbone": names}})


def _absolute_backbone(name: str) -> str:
    return _absolute(name) if Path(name).expanduser().is_dir() else name


def _submitted_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _refuse_relative(key: str, path: str | None) -> None:
    if path is not None and not Path(path).expanduser().is_absolute():
        raise UserError(
            f"{key}: {path!r} is relative, but a submitted job runs in a temporary copy of the working directory; "
            "give an absolute path that every node sees"
        )
