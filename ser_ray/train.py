"""Train one trial: a TorchTrainer around `ser_ray.training.loop`, fed by Ray Data; or in this process, without Ray.

python -m ser_ray.train SPACE.yaml [key=value ...]
python -m ser_ray.train SPACE.yaml resources.workers=0        # in this process: breakpoints work
"""

from __future__ import annotations

if __name__ == "__main__":  # hand over at once, so that workers find everything in ser_ray.train, not in __main__
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["train", *sys.argv[1:]]))

import shutil
import socket
import threading
import time
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

from ser_ray import cache, config, disk, prepare
from ser_ray.assets.pretraining_overlap import pretraining_overlap
from ser_ray.config import Experiment, SearchSpace
from ser_ray.errors import MemoryShortageError, UserError
from ser_ray.evaluation import folder
from ser_ray.evaluation.results import the_probe
from ser_ray.protocols.leakage import audit_search
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import cluster, feed, nodes, plan
from ser_ray.runtime.plan import RunPlan
from ser_ray.search.trials import Trials
from ser_ray.speech import cached_features
from ser_ray.speech.fingerprint import same_recordings_in

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
        opened: AbstractContextManager[cache.CachedFeatures | None] = nullcontext()
    elif allocation.workers <= 1:
        opened = cache.keep(planned, wanted, console, here=True)
    else:
        opened = cache.find(planned.space, wanted, planned.shard_dirs)
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
    callbacks: Iterable[Any] = (),
    callback: EpochCallback | None = None,
) -> None:
    """Train on Ray: data-parallel workers fed by Ray Data; continues from the trial's last checkpoint, if it has one.

    ``datasets``: what stays in the object store, if it is loaded already. With ``callback`` this process is the only
    worker (Ray Train's local mode): it holds the worker's resources, and calls ``callback`` after every epoch.
    Raises UserError where a worker did (an adapter without a gradient, a loss that is not finite), else Ray's error.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    if datasets is None:
        datasets = feed.load_resident(trial.load()[1], trial.resident, *trial.files())
    directory = Path(trial.directory)
    trainer = TorchTrainer(
        _work_explained if callback is None else lambda settings: _work_explained(settings, callback),
        train_loop_config=asdict(trial),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if callback else trial.workers,
            use_gpu=trial.gpus > 0,
            resources_per_worker={"CPU": trial.cpus} | ({"GPU": trial.gpus} if trial.gpus else {}),
        ),
        # Ray would go by the GPUs declared to it; and NCCL does not allow two processes on one GPU.
        torch_config=TorchConfig(backend="nccl" if trial.cuda and trial.gpus >= 1 else "gloo"),
        datasets=dict(datasets),
        # Ray's split gives blocks to whichever worker asks first, and drops rows to make shares equal.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            callbacks=list(callbacks),
            # A trial that fails is continued by its caller: a search, or the same command.
            failure_config=ray.train.FailureConfig(max_failures=0),
            logging_config=ray.train.LoggingConfig("ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        causes = (cluster.user_error(failure, trial.directory) for failure in error.worker_failures.values())
        raise next(filter(None, causes), error) from None
    except RayError as error:
        raise cluster.user_error(error, trial.directory) or error from None


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
        console = Console(file=notes, highlight=False, soft_wrap=True)
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
    import torch

    from ser_ray.speech import stream
    from ser_ray.training import loop

    experiment, task = trial.load()
    directory = Path(trial.directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def on_epoch(record: folder.Record, save: loop.Save) -> None:
        _write_epoch(directory, record, save)
        callback(record)

    model, content = trial.model(experiment, device)
    files = {split: stream.Files(task.rows(split), *trial.files()) for split in ("train", "dev")}
    train, dev = (own.hold() if split in trial.resident else own for split, own in files.items())
    data = feed.data(experiment, train, dev, content)
    loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))


def audit_task(space: SearchSpace, task: Task, console: Console, shard_dirs: Iterable[Path]) -> dict[str, Any]:
    """Audit every fold that the space trains and print the findings; returns the audit.

    Raises UserError for a finding that makes training pointless.
    """
    with console.status("audit: fingerprints of the audio"):
        known = pretraining_overlap(space.backbones(), space.experiment.corpora)
        findings = audit_search(space, task, same_recordings_in(shard_dirs), known)
    sizes = (
        f"{split} {part['utterances']} ({part['speakers']} speakers)" for split, part in findings["splits"].items()
    )
    console.print(f"split: {task.fold.description}: {', '.join(sizes)}")
    if folds := findings.get("folds"):
        console.print(f"audited: {len(folds)} folds that are trained, {', '.join(folds)}")
    for finding in findings["findings"]:
        style = "dim" if finding["level"] == "note" else "bold red"
        console.print(f"audit {finding['level']}: {finding['what']}: {finding['detail']}", style=style)
        if finding["level"] == "error":
            raise UserError(f"audit: {finding['what']}: {finding['detail']}")
    return findings


def open_results(space: SearchSpace, planned: RunPlan, findings: dict[str, Any], argv: list[str]) -> Path:
    """Create the results folder with search.yaml, plan.json, provenance.json and audit.json; an existing one is
    continued with the current plan.

    Raises UserError where the folder belongs to another configuration, or cannot be written.
    """
    directory = space.results_dir()
    existing = directory / "search.yaml"
    try:
        if existing.is_file():
            before = config.load(existing)
            if refused := config.refused(before, space):
                raise UserError(
                    f"{directory} holds another search of that name, which differs in {'; '.join(refused)}; "
                    "set experiment.name, or remove the folder"
                )
            if config.differences(before, space):
                disk.write_text(existing, config.dump(space))
            disk.write_json(directory / plan.FILE, planned.to_dict())
            disk.write_json(directory / "audit.json", findings)
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        disk.write_json(directory / "audit.json", findings)
        disk.write_json(directory / plan.FILE, planned.to_dict())
        shard_dirs = [Path(shard_dir) for shard_dir in planned.shard_dirs]
        disk.write_json(directory / "provenance.json", cluster.provenance(space, shard_dirs, argv))
        disk.write_text(existing, config.dump(space))
    except OSError as error:
        raise UserError(f"storage.results: cannot write to {directory}: {error.strerror}") from None
    return directory


def train(space: SearchSpace, console: Console, argv: list[str]) -> Path:
    """Prepare data and train one trial, up to its row in ``trials.csv``; returns its results folder.

    Runs on the Ray that `cluster.connect` joined, or in this process if ``resources.workers`` is 0. An interrupted
    trial is continued, and so is one that ran all its epochs if ``experiment.epochs`` has grown.

    Raises UserError, also where another process works on that folder.
    """
    planned, task = make_plan(alone(space), console)
    findings = audit_task(planned.space, task, console, map(Path, planned.shard_dirs))
    with folder.alone(space.results_dir()):
        directory = open_results(space, planned, findings, argv)
        _train_in(directory, planned, task, console, argv)
    return directory


def _train_in(directory: Path, planned: RunPlan, task: Task, console: Console, argv: list[str]) -> None:
    space = planned.space
    here = planned.allocation.workers == 0
    trials = Trials(directory, (), argv=argv)
    if "single" not in trials.known:
        trials.add("single", {})
    trials.start("single")
    trial_dir = planned.directory() / "single"
    started = time.monotonic()
    console.print(f"training {space.experiment.backbone} ({space.experiment.adapter.method}), {task.fold.description}")

    def show(record: folder.Record) -> None:
        console.print(folder.describe_epoch(record, space.tune.metric))

    def attempt(experiment: Experiment) -> None:
        with open_trial(planned, experiment, trial_dir, console) as trial:
            if here:
                with _memory_explained(trial):
                    fit_here(trial, show)
            else:
                with _following(trial_dir, show):
                    fit_on_ray(trial)

    with nullcontext() if here else cache.made_first(planned, console):
        _train_single(trials, space.experiment, attempt, console)
    row = folder.trial_row(trials.update("single", time.monotonic() - started, status="finished"))
    probe = the_probe([row["checkpoint"]])
    when = f"epoch {row['best_epoch']}{probe and ', ' + probe}"
    console.print(f"best dev UAR {row['dev_uar']:.3f} in {when}: {directory / row['checkpoint']}")


def alone(space: SearchSpace) -> SearchSpace:
    """The space reduced to its own experiment: nothing is searched, and no other fold or seed is trained."""
    tune = space.tune.model_copy(update={"trials": 1, "final_folds": None, "final_seeds": 1, "rotate_dev": False})
    return space.model_copy(update={"search": {}, "tune": tune})


def make_plan(space: SearchSpace, console: Console, trials: int = 1) -> tuple[RunPlan, Task]:
    """Prepare what is missing and plan ``trials`` of a space over it; returns the plan and the utterances by split.

    Raises UserError for what can never run: a backbone that is missing, resources that the cluster does not have.
    """
    plan.check(space)
    here = space.resources.workers == 0
    allocation = cluster.allocate_here() if here else cluster.allocate(space, trials, console)
    if not here:
        at_once = f"{allocation.trials_at_once} trial{'s' * (allocation.trials_at_once != 1)} at once"
        console.print("; ".join((f"Ray: {cluster.describe()}", at_once, *allocation.idle)))
    shard_dirs = prepare.prepare(space, use_ray=not here, console=console)
    task = load_task(space.experiment, shard_dirs)
    return plan.make(space, allocation, shard_dirs, task), task


def main(path: Path, overrides: list[str], dry_run: bool = False) -> int:
    """``ser-ray train``: one trial; with ``dry_run`` only its plan."""
    space = cluster.resolve_paths(config.load(path, overrides))
    console = Console(highlight=False, soft_wrap=True)
    if space.resources.workers > 0:
        cluster.connect(space)
    if dry_run:
        show_plan(make_plan(alone(space), console)[0], console)
        return 0
    directory = train(space, console, ["train", str(path), *overrides])
    console.print(f"next: ser-ray evaluate {directory}")
    return 0


def show_plan(planned: RunPlan, console: Console) -> None:
    """What ``--dry-run`` prints."""
    console.print(f"plan of {planned.space.experiment.name}; nothing is trained", markup=False)
    for line in planned.lines():
        console.print(f"  {line}", markup=False)


# -- below: how it is done


def _work(settings: dict[str, Any], callback: EpochCallback | None = None) -> None:
    """What every worker runs; in local mode, where Ray Train passes nothing on, ``callback`` gets the records."""
    import torch
    from ray.train.torch import get_device

    from ser_ray.models.precision import bound_memory
    from ser_ray.training import loop

    trial = Trial(**settings)
    experiment, task = trial.load()
    torch.set_num_threads(max(1, int(trial.cpus)))
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
    data = feed.data(experiment, sources["train"], sources["dev"], content, rank, size)
    try:
        loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))
    finally:
        for source in sources.values():
            if isinstance(source, feed.Streamed):
                source.close()


def _work_explained(settings: dict[str, Any], callback: EpochCallback | None = None) -> None:
    with _memory_explained(Trial(**settings)):
        _work(settings, callback)


@contextmanager
def _memory_explained(trial: Trial) -> Iterator[None]:
    """Turn an out-of-memory error of the body into a MemoryShortageError: one line that says what to change."""
    from ser_ray.training.memory import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        share = f" (its share of a GPU: {trial.gpus:g})" if 0 < trial.gpus < 1 else ""
        raise MemoryShortageError(
            f"out of memory{share}: lower experiment.batch_seconds ({trial.experiment['batch_seconds']:g}), set "
            "experiment.recompute to true, or raise resources.gpus_per_worker"
        ) from error


def _train_single(trials: Trials, full: Experiment, attempt: Callable[[Experiment], None], console: Console) -> None:
    """Train the trial ``single``; if memory is short, once more from its last checkpoint, with half of the batch."""
    try:
        attempt(full.halved() if trials.known["single"].halved else full)
        return
    except MemoryShortageError as error:
        if trials.short_of_memory("single", str(error)).over:
            raise
        console.print(f"{error}; retrying with half of batch_seconds and twice as many batches per step")
    # Not in the handler: its error keeps a reference to the model.
    _train_single(trials, full, attempt, console)


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
        raise cluster.user_error(error, directory) or error from None


@contextmanager
def _following(directory: Path, show: Callable[[folder.Record], None]) -> Iterator[None]:
    """Show every line that is added to a trial's history while the body runs."""
    ended = threading.Event()
    seen = len(folder.trial_history(directory))

    def follow() -> None:
        shown = seen
        while True:
            last_look = ended.wait(0.5)
            for record in folder.trial_history(directory)[shown:]:
                show(record)
                shown += 1
            if last_look:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
