"""Ray, started or joined in one place: the only ``ray.init`` of the project, what fits on it, where paths lead."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data

from ser_ray import __version__, disk, nodes
from ser_ray.config import Distribution, Experiment, SearchSpace
from ser_ray.corpora import table
from ser_ray.schema import StorageError, UserError
from ser_ray.speech import shards

DATA_CPUS = 1
"""Logical CPUs of a node that no trial may take: Ray Data's tasks would wait for ever if trainers held every one."""

RAYS_OWN_PORTS = frozenset({6379, 8265, 10001, 44217, 44227, 52365})
"""Defaults of its components; 52365, the dashboard agent's, is among the ports that the system gives away."""
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


_PACKAGES = ("torch", "torchaudio", "transformers", "peft", "bitsandbytes", "ray", "optuna", "pyarrow", "scikit-learn")


@dataclass(frozen=True)
class Worker:
    """What one training worker takes."""

    cpus: float
    gpus: float


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
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A nested trial is several small processes, which Ray otherwise warns about as if they were a leak.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, cpus)))
        os.environ["RAY_GCS_SERVER_PORT"] = port = str(_free_port())
        address = f"127.0.0.1:{port}"
        options: dict[str, Any] = {"address": "local", "num_cpus": cpus + DATA_CPUS, "dashboard_host": "127.0.0.1"}
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
        raise UserError(f"{address}: no Ray cluster answers; start it, or unset RAY_ADDRESS") from None
    finally:
        if offered is None:
            del os.environ["RAY_ADDRESS"]
    _heed_signals()
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not verbose:  # their progress is Ray's own, ours is for people; and `ser_ray.watch` says what fails in Tune
        for name, level in (("data", logging.ERROR), ("train", logging.ERROR), ("tune", logging.CRITICAL)):
            logging.getLogger(f"ray.{name}").setLevel(level)


def describe() -> str:
    """One line on the cluster, for people."""
    total, count = ray.cluster_resources(), len(nodes.alive())
    gpus = total.get("GPU", 0)
    return f"{count} node{'s' * (count != 1)}, {total.get('CPU', 0):g} logical CPUs, {gpus:g} GPU{'s' * (gpus != 1)}"


def worker(space: SearchSpace) -> Worker:
    """What one worker takes here, with ``auto`` resolved."""
    wanted = space.resources
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    gpus = float(has_gpu) if wanted.gpus_per_worker == "auto" else wanted.gpus_per_worker
    if wanted.cpus_per_worker != "auto":
        return Worker(wanted.cpus_per_worker, gpus)
    per_node = min((node["Resources"].get("CPU", 0) for node in nodes.alive()), default=1)
    return Worker(min(4.0, max(1.0, per_node - DATA_CPUS)) if gpus else 1.0, gpus)


def capacity(space: SearchSpace) -> int:
    """Workers that fit at once, each on one node, beside a CPU for the data on every node; where the nodes are too
    small for that, on one of them."""
    one, offers = worker(space), [node["Resources"] for node in nodes.alive()]
    room = sorted(((offer.get("CPU", 0.0), offer.get("GPU", 0.0)) for offer in offers), reverse=True)
    beside = sum(_fits(cpus - DATA_CPUS, gpus, one) for cpus, gpus in room)
    # Else it is taken where it costs the fewest workers.
    return beside or max(
        sum(_fits(cpus - DATA_CPUS * (i == reserved), gpus, one) for i, (cpus, gpus) in enumerate(room))
        for reserved in range(len(room))
    )


def concurrency(space: SearchSpace) -> int:
    """Trials that fit at once.

    Raises UserError where not even one fits: Ray itself would wait for ever.
    """
    workers = max(1, space.resources.workers)
    fits = capacity(space) // workers
    if fits < 1:
        one, offers = worker(space), [node["Resources"] for node in nodes.alive()]
        has = ", ".join(f"{offer.get('CPU', 0):g} CPUs and {offer.get('GPU', 0):g} GPUs" for offer in offers)
        lacking = "GPUs" if one.gpus > sum(offer.get("GPU", 0) for offer in offers) else "room"
        raise UserError(
            f"resources: a trial takes {workers} x ({one.cpus:g} CPUs, {one.gpus:g} GPUs), each on one node, beside "
            f"{DATA_CPUS} CPU for data, but the cluster lacks the {lacking}: its {len(offers)} node"
            f"{'s have' if len(offers) > 1 else ' has'} {has}; lower resources.workers, cpus_per_worker or "
            "gpus_per_worker"
        )
    return min(fits, space.tune.concurrency or fits, space.tune.trials)


def user_error(error: BaseException, where: object = "") -> UserError | None:
    """The UserError behind what Ray raises when a process of ours failed, if there is one; a StorageError where that
    process could not write its files, which are ``where`` if the error does not say it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            kind = StorageError if isinstance(cause, StorageError) else UserError
            return kind(str(cause).splitlines()[-1])
        if isinstance(cause, OSError) and (line := disk.explain(cause, where)):
            return StorageError(line)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def settle_paths(space: SearchSpace) -> SearchSpace:
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
    search = {key: _settle_conditions(distribution) for key, distribution in space.search.items()}
    if "backbone" in search and search["backbone"].choice is not None:
        choice = tuple(_absolute_backbone(name) for name in search["backbone"].choice)
        search["backbone"] = search["backbone"].model_copy(update={"choice": choice})
    first = tuple(
        {key: _absolute_backbone(value) if key == "backbone" else value for key, value in point.items()}
        for point in space.tune.first
    )
    return space.model_copy(
        update={
            "experiment": _settle_experiment(space.experiment),
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


def _fits(cpus: float, gpus: float, one: Worker) -> int:
    """Workers on one node. Ray shares a GPU among whole parts: of 0.3 each three fit, and of 1.5 GPUs none on one."""
    by_cpu = int(cpus / one.cpus + 1e-9) if one.cpus else 10**6
    return max(0, min(by_cpu, int(gpus / one.gpus + 1e-9)) if one.gpus else by_cpu)


def _offered() -> str | None:
    """The cluster that somebody offers: by RAY_ADDRESS, or by ``ray start`` on this machine.

    Ray's own "auto" would also join the private Ray of any other command that runs here.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named not in ("", "auto"):
        return named
    started = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"  # noqa: S108 (Ray's own place)
    if started.is_file():
        return started.read_text(encoding="utf-8").strip()
    return named or None


def _heed_signals() -> None:
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


def _settle_experiment(experiment: Experiment) -> Experiment:
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


def _settle_conditions(distribution: Distribution) -> Distribution:
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
