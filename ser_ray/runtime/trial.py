"""One trial: a TorchTrainer around `ser_ray.training.loop`, fed by Ray Data; or the same loop in this process, without
Ray."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray.exceptions import RayError
from rich.console import Console

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.evaluation import folder
from ser_ray.protocols.task import Task
from ser_ray.runtime import cluster, failures, feature_cache, feed, nodes
from ser_ray.runtime.allocation import Worker
from ser_ray.runtime.plan import RunPlan
from ser_ray.schema import MemoryShortageError
from ser_ray.speech import cached_features
from ser_ray.terminal import PlainConsole

# The model and its loop take seconds to import. They are imported where they run, as many processes only start and
# watch a trial.
if TYPE_CHECKING:
    import torch

    from ser_ray.models.classifier import EmotionClassifier
    from ser_ray.speech.stream import Content
    from ser_ray.training import loop


EpochCallback = Callable[[folder.Record], None]
"""Receives the record of an epoch after it is written."""


@dataclass(frozen=True)
class Trial:
    """All that a worker needs to know, in plain types."""

    experiment: dict[str, Any]
    metric: str
    fold: str
    """The file with its utterances by split and where their speech is (`ser_ray.protocols.task`)."""
    cached: str | None
    """The directory of the cached features, if the trial is trained on them."""
    directory: str
    """Where its history and checkpoints go: ``results/<name>/trials/<trial_id>``."""
    workers: int
    cpus: float
    gpus: float
    cuda: bool
    """Whether its workers see a CUDA device: GPUs declared to Ray may not exist."""
    resident: tuple[str, ...]
    """Which splits stay in memory between epochs."""
    prefix: dict[str, Any] | None
    """The fields of the `ser_ray.speech.cached_features.Prefix` that ``cached`` belongs to, if it is set."""

    @property
    def threads(self) -> int:
        """How many threads a worker computes with, and decodes with."""
        return Worker(self.cpus, self.gpus).threads

    def load(self) -> tuple[Experiment, Task]:
        """The experiment and its utterances by split."""
        return Experiment.model_validate(self.experiment), Task.read(Path(self.fold))

    def files(self) -> tuple[str, Path | None]:
        """The column of the model's input, and the directory of the cached features, None if the input is waveforms."""
        return (cached_features.COLUMN, Path(self.cached)) if self.cached is not None else ("audio", None)

    def model(self, experiment: Experiment, device: torch.device) -> tuple[EmotionClassifier, Content]:
        """The model before training, and how to read its input."""
        from ser_ray.models.classifier import build
        from ser_ray.speech.stream import content_of

        model = build(experiment, device)
        model.prefix = cached_features.Prefix(**self.prefix) if self.prefix else None
        return model, content_of(model.prefix)


@contextmanager
def open_trial(planned: RunPlan, experiment: Experiment, directory: Path, console: Console) -> Iterator[Trial]:
    """A trial of a plan that can be trained while the body runs.

    It is trained on the cached features of its model's frozen part, if there are any. A missing cache is made here, on
    the device that this process holds; the process behind a trial of several workers holds none, and makes none.
    """
    allocation, wanted = planned.allocation, planned.prefix(experiment)
    if wanted is None:
        opened: AbstractContextManager[feature_cache.CachedFeatures | None] = nullcontext()
    elif allocation.workers <= 1:
        opened = feature_cache.keep(planned, wanted, console)
    else:
        opened = feature_cache.find(planned.space, wanted, planned.shard_dirs)
    with opened as cached:
        fold = planned.write_fold(experiment)
        prefix = None if cached is None else cached.prefix
        yield Trial(
            config.to_dict(experiment),
            planned.space.tune.metric,
            str(fold),
            None if cached is None else str(cached.paths[0].parent),
            str(directory),
            max(1, allocation.workers),
            allocation.worker.cpus,
            allocation.worker.gpus,
            allocation.cuda,
            feed.resident_splits(planned.space, Task.read(fold), prefix),
            None if prefix is None else asdict(prefix),
        )


def fit_on_ray(
    trial: Trial,
    datasets: Mapping[str, ray.data.Dataset] | None = None,
    ray_callbacks: Iterable[Any] = (),
    callback: EpochCallback | None = None,
) -> None:
    """Train on Ray: data-parallel workers fed by Ray Data; continues from the trial's last checkpoint, if it has one.

    ``datasets``: what stays in the object store, if it is loaded already. ``ray_callbacks``: Ray Train's own. With
    ``callback`` this process is the only worker (Ray Train's local mode): it holds the worker's resources, and calls
    ``callback`` after every epoch.
    Raises UserError where a worker did (an adapter without a gradient, a loss that is not finite), else Ray's error.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    from ser_ray.runtime.rendezvous import ByFile

    if datasets is None:
        datasets = feed.load_resident(trial.load()[1], trial.resident, *trial.files())
    directory = Path(trial.directory)
    group = ByFile if cluster.is_own() else TorchConfig
    trainer = TorchTrainer(
        _work_explained if callback is None else lambda settings: _work_explained(settings, callback),
        train_loop_config=asdict(trial),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if callback else trial.workers,
            use_gpu=trial.gpus > 0,
            resources_per_worker={"CPU": trial.cpus} | ({"GPU": trial.gpus} if trial.gpus else {}),
        ),
        # Ray would go by the GPUs declared to it; and NCCL does not allow two processes on one GPU.
        torch_config=group(backend="nccl" if trial.cuda and trial.gpus >= 1 else "gloo"),
        datasets=dict(datasets),
        # Ray's split gives blocks to whichever worker asks first, and drops rows to make shares equal.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            callbacks=list(ray_callbacks),
            # A trial that fails is continued by its caller: a search, or the same command.
            failure_config=ray.train.FailureConfig(max_failures=0),
            logging_config=ray.train.LoggingConfig("ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        causes = (failures.user_error(failure, trial.directory) for failure in error.worker_failures.values())
        raise next(filter(None, causes), error) from None
    except RayError as error:
        raise failures.user_error(error, trial.directory) or error from None


def run_trial(point: dict[str, Any], plan: RunPlan, kind: str, speech: Mapping[str, ray.data.Dataset]) -> None:
    """Train one trial of a search, as Tune calls it, with a TorchTrainer of its own that reports epochs to Tune.

    A single worker is this process; several are processes of their own, which adds some twenty seconds to a trial.
    ``point``: its trial_id, the folder below ``plan.directory(kind)``; the values of the searched keys; and whether its
    batches are halved. ``speech``: the datasets of waveforms, if trials share them. Raises UserError, also where the
    results folder can no longer be written.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    trial_dir, values = plan.directory(kind) / point["trial_id"], point["values"]
    with _explained(trial_dir), (trial_dir / folder.NOTES).open("a", encoding="utf-8", buffering=1) as notes:
        console = PlainConsole(file=notes)
        if len(nodes.alive()) > 1:
            console.print(f"runs on {socket.gethostname()} ({ray.util.get_node_ip_address()})")
        experiment = plan.space.trial(values)
        experiment = experiment.halved() if point["halved"] else experiment
        with open_trial(plan, experiment, trial_dir, console) as trial:
            shared = speech if speech and trial.prefix is None else None
            if plan.allocation.workers == 1:
                fit_on_ray(trial, shared, callback=tune.report)
            else:
                fit_on_ray(trial, shared, [TuneReportCallback()])


def fit_here(trial: Trial, callback: EpochCallback = lambda record: None) -> None:
    """Train in this process, without Ray: the same loop over the same shards, with the same files as a result."""
    from ser_ray.models.precision import choose_device
    from ser_ray.speech import stream
    from ser_ray.training import loop

    experiment, task = trial.load()
    directory = Path(trial.directory)

    def on_epoch(record: folder.Record, save: loop.Save) -> None:
        _write_epoch(directory, record, save)
        callback(record)

    model, content = trial.model(experiment, choose_device())
    files = {split: stream.Files(task.rows(split), *trial.files()) for split in ("train", "dev")}
    train, dev = (own.hold() if split in trial.resident else own for split, own in files.items())
    data = feed.data(experiment, train, dev, content, threads=trial.threads)
    loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))


# -- below: how it is done


def _work(settings: dict[str, Any], callback: EpochCallback | None = None) -> None:
    """What every worker runs; in local mode, where Ray Train passes nothing on, ``callback`` gets the records."""
    import torch
    from ray.train.torch import get_device

    from ser_ray.models.precision import bound_memory
    from ser_ray.training import loop

    trial = Trial(**settings)
    experiment, task = trial.load()
    torch.set_num_threads(trial.threads)
    bound_memory(trial.gpus)
    rank, size, directory = 0, 1, Path(trial.directory)
    if callback is None:
        context, callback = ray.train.get_context(), ray.train.report
        rank, size = context.get_world_rank(), context.get_world_size()
    sources = {
        split: feed.held(task.rows(split), ray.train.get_dataset_shard(split))
        if split in trial.resident
        else feed.Streamed(task.rows(split), *trial.files())
        for split in ("train", "dev")
    }

    def on_epoch(record: folder.Record, save: loop.Save) -> None:
        if rank == 0:
            _write_epoch(directory, record, save)
        callback(record)

    loop.forget_peak()  # that of the previous trial, if this process trained one
    model, content = trial.model(experiment, get_device() if trial.cuda else torch.device("cpu"))
    data = feed.data(experiment, sources["train"], sources["dev"], content, rank, size, trial.threads)
    try:
        loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))
    finally:
        for source in sources.values():
            if isinstance(source, feed.Streamed):
                source.close()


def _work_explained(settings: dict[str, Any], callback: EpochCallback | None = None) -> None:
    with memory_explained(Trial(**settings)):
        _work(settings, callback)


@contextmanager
def memory_explained(trial: Trial) -> Iterator[None]:
    """Turn an out-of-memory error of the body into a MemoryShortageError: one line that says what to change."""
    from ser_ray.training.memory import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        share, more = "", ""
        if 0 < trial.gpus < 1:
            share, more = f" (its share of a GPU: {trial.gpus:g})", ", or raise resources.gpus_per_worker"
        raise MemoryShortageError(
            f"out of memory{share}: lower experiment.batch_seconds ({trial.experiment['batch_seconds']:g}), or set "
            f"experiment.recompute to true{more}"
        ) from error


def _write_epoch(directory: Path, record: folder.Record, save: loop.Save) -> None:
    """Write an epoch's checkpoint and its line of the history; of the earlier checkpoints only the best stays."""
    if record in folder.trial_history(directory):
        return  # reported again: the driver may have died before it received the record
    target = directory / folder.checkpoint_name(record["epoch"])
    aside = directory / f".{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    folder.append_history(directory, record)
    keep = {target.name, folder.checkpoint_name(record["best_epoch"])}
    for old in directory.glob("epoch_*"):
        if old.name not in keep:
            shutil.rmtree(old)


def _last_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the last epoch in the history; an epoch without a line there was never reported."""
    recorded = [directory / folder.checkpoint_name(record["epoch"]) for record in folder.trial_history(directory)]
    return next((path for path in reversed(recorded) if path.is_dir()), None)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn an error of the body about files that cannot be written into a StorageError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise failures.user_error(error, directory) or error from None
