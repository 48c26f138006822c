"""Train one trial: a TorchTrainer around `ser_ray.training.loop`, fed by Ray Data; or in this process, without Ray.

python -m ser_ray.train SPACE.yaml [key=value ...]
python -m ser_ray.train SPACE.yaml resources.workers=0        # in this process: breakpoints work
"""

from __future__ import annotations

if __name__ == "__main__":  # hand over at once: workers find everything in ser_ray.train, not in __main__
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["train", *sys.argv[1:]]))

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
import ray.train
from rich.console import Console

from ser_ray import cache, cluster, config, disk, feed, nodes, prepare
from ser_ray.assets.heard import heard
from ser_ray.config import Experiment, SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.results import the_probe
from ser_ray.protocols.leakage import audit_search
from ser_ray.protocols.task import Task, load_task
from ser_ray.schema import UserError
from ser_ray.search.trials import Trials
from ser_ray.speech import kept, shards
from ser_ray.speech.fingerprint import same_takes_in

# The model and its loop take seconds to import. They are imported where they run, for the processes that only start
# and watch a trial are many.
if TYPE_CHECKING:
    import torch

    from ser_ray.models.classifier import EmotionClassifier
    from ser_ray.speech.stream import Content
    from ser_ray.training import loop


Tell = Callable[[folder.Record], None]
"""Hears of an epoch that is written."""


@dataclass(frozen=True)
class Trial:
    """All that a worker needs to know, in plain types."""

    experiment: dict[str, Any]
    metric: str
    shard_dirs: tuple[str, ...]
    """Where the index of the speech is read."""
    paths: tuple[str, ...]
    """The files that it is fed from: the shards of the speech, or what a frozen prefix kept of them."""
    directory: str
    """Where its history and checkpoints go: ``results/<name>/trials/<trial_id>``."""
    workers: int
    cpus: float
    gpus: float
    resident: bool
    """Whether the data stay in memory between epochs."""
    prefix: dict[str, Any] | None
    """The fields of a `ser_ray.models.prefix.Prefix`, where that is what the trial is fed."""

    def load(self) -> tuple[Experiment, Task]:
        """The experiment and its utterances by split."""
        experiment = Experiment.model_validate(self.experiment)
        return experiment, load_task(experiment, [Path(directory) for directory in self.shard_dirs])

    def column(self) -> str:
        """The column of the files that holds what the model is fed."""
        return kept.COLUMN if self.prefix else "audio"

    def model(self, experiment: Experiment, device: torch.device) -> tuple[EmotionClassifier, Content]:
        """The model before training, and how what it is fed is read."""
        from ser_ray.models.classifier import build
        from ser_ray.speech.stream import content_of

        model = build(experiment, device)
        model.prefix = kept.Prefix(**self.prefix) if self.prefix else None
        return model, content_of(model.prefix)


@contextmanager
def open_trial(
    space: SearchSpace,
    experiment: Experiment,
    planned: cache.Plan,
    shard_dirs: Sequence[Path],
    directory: Path,
    console: Console,
    actors: int,
) -> Iterator[Trial]:
    """A trial that can be trained while the body runs: what is frozen in it is computed by ``actors``, and kept."""
    workers = space.resources.workers
    one = cluster.worker(space) if workers else cluster.Worker(1, 0)
    with cache.keep(space, experiment, planned, shard_dirs, actors, console) as found:
        if found is not None:
            console.print(str(found))
        speech = tuple(path for shard_dir in shard_dirs for path in shards.shard_paths(shard_dir))
        paths = speech if found is None else found.paths
        yield Trial(
            config.to_dict(experiment),
            space.tune.metric,
            tuple(map(str, shard_dirs)),
            tuple(map(str, paths)),
            str(directory),
            max(1, workers),
            one.cpus,
            one.gpus,
            workers > 0 and feed.stays_resident(space, paths),
            None if found is None else asdict(found.prefix),
        )


def fit_on_ray(
    trial: Trial,
    datasets: Mapping[str, ray.data.Dataset] | None = None,
    callbacks: Iterable[Any] = (),
    tell: Tell | None = None,
) -> None:
    """Train on Ray: data-parallel workers fed by Ray Data; continues by itself where the trial left off.

    ``datasets``: the trial's data where they are loaded already. With ``tell`` there is one worker, and it is this
    process (Ray Train's local mode): it holds what the worker takes, and hears of every epoch.
    Raises UserError where a worker did (an adapter that never learns, a loss that is not finite), else Ray's error.
    """
    from ray.train.torch import TorchTrainer

    if datasets is None:
        _, task = trial.load()
        paths = [Path(path) for path in trial.paths]
        datasets = feed.load_datasets(task, paths, trial.column(), trial.workers, trial.resident)
    directory = Path(trial.directory)
    trainer = TorchTrainer(
        _work if tell is None else lambda settings: _work(settings, tell),
        train_loop_config=asdict(trial),
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if tell else trial.workers,
            use_gpu=trial.gpus > 0,
            resources_per_worker={"CPU": trial.cpus} | ({"GPU": trial.gpus} if trial.gpus else {}),
        ),
        datasets=dict(datasets),
        # Ray's split gives blocks to whoever asks first, and drops rows to make shares equal.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        run_config=ray.train.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            callbacks=list(callbacks),
            # One that fails is continued by whoever started it: a search, or the same command.
            failure_config=ray.train.FailureConfig(max_failures=0),
            logging_config=ray.train.LoggingConfig("ERROR"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        causes = (cluster.user_error(failure, trial.directory) for failure in error.worker_failures.values())
        raise next(filter(None, causes), error) from None


def run_trial(
    point: dict[str, Any],
    space: dict[str, Any],
    shard_dirs: list[str],
    directory: str,
    planned: cache.Plan,
    speech: Mapping[str, ray.data.Dataset],
) -> None:
    """One trial of a search, as Tune calls it, whose epochs travel back to Tune: a TorchTrainer of its own.

    One worker is this process; several are processes of their own, which takes a trial some twenty seconds more.
    ``point``: its trial_id, below ``directory``, and the values of the searched keys. ``speech``: the datasets of
    waveforms where trials share them. Raises UserError, also where the results folder cannot be written any more.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    settled = SearchSpace.model_validate(space)
    trial_dir, values = Path(directory) / point["trial_id"], point["values"]
    with _explained(trial_dir), (trial_dir / folder.NOTES).open("a", encoding="utf-8", buffering=1) as notes:
        console = Console(file=notes, highlight=False, soft_wrap=True)
        if len(nodes.alive()) > 1:
            console.print(f"runs on {socket.gethostname()} ({ray.util.get_node_ip_address()})")
        dirs, workers = [Path(shard_dir) for shard_dir in shard_dirs], max(1, settled.resources.workers)
        with open_trial(settled, settled.trial(values), planned, dirs, trial_dir, console, workers) as trial:
            shared = speech if speech and trial.prefix is None else None
            if workers == 1:
                fit_on_ray(trial, shared, tell=tune.report)
            else:
                fit_on_ray(trial, shared, [TuneReportCallback()])


def fit_here(trial: Trial, tell: Tell = lambda record: None) -> None:
    """Train in this process, without Ray: the same loop over the same shards, with the same files as a result."""
    import torch

    from ser_ray.training import loop

    experiment, task = trial.load()
    directory = Path(trial.directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tables(labels: Mapping[str, int]) -> Iterator[pa.Table]:
        for table in shards.read_paths(map(Path, trial.paths)):
            yield shards.select(table, labels)

    def on_epoch(record: folder.Record, save: loop.Save) -> None:
        _write_epoch(directory, record, save)
        tell(record)

    model, content = trial.model(experiment, device)
    train, dev = (partial(tables, task.labels(split)) for split in ("train", "dev"))
    data = feed.data(experiment, task, train, dev, content)
    loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))


def audit_task(space: SearchSpace, task: Task, console: Console, shard_dirs: Iterable[Path]) -> dict[str, Any]:
    """The audit of every fold that the space trains, its findings shown.

    Raises UserError for a finding that makes training pointless.
    """
    with console.status("audit: fingerprints of the audio"):
        known = heard(space.backbones(), space.experiment.corpora)
        findings = audit_search(space, task, same_takes_in(shard_dirs), known)
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


def open_results(space: SearchSpace, shard_dirs: list[Path], findings: dict[str, Any], argv: list[str]) -> Path:
    """Create the results folder with search.yaml, provenance.json and audit.json; an existing one is continued.

    Raises UserError where the folder belongs to another configuration, or cannot be written.
    """
    directory = space.results_dir()
    existing = directory / "search.yaml"
    try:
        if existing.is_file():
            changes = config.differences(config.load(existing), space)
            refused = [change for change in changes if not change.startswith(config.MAY_CHANGE)]
            if refused:
                raise UserError(
                    f"{directory} holds another search of that name, which differs in {'; '.join(refused)}; "
                    "set experiment.name, or remove the folder"
                )
            if changes:
                disk.write_text(existing, config.dump(space))
            return directory
        directory.mkdir(parents=True, exist_ok=True)
        disk.write_json(directory / "audit.json", findings)
        disk.write_json(directory / "provenance.json", cluster.provenance(space, shard_dirs, argv))
        disk.write_text(existing, config.dump(space))
    except OSError as error:
        raise UserError(f"storage.results: cannot write to {directory}: {error.strerror}") from None
    return directory


def train(space: SearchSpace, console: Console, argv: list[str]) -> Path:
    """One trial from prepared data to the row in ``trials.csv``; returns its results folder.

    On the Ray that `cluster.connect` joined, or in this process where ``resources.workers`` is 0. A trial that was cut
    off is continued.
    """
    here = space.resources.workers == 0
    if not here:
        cluster.concurrency(space)
    shard_dirs = prepare.prepare(space, use_ray=not here, console=console)
    task = load_task(space.experiment, shard_dirs)
    directory = open_results(space, shard_dirs, audit_task(space, task, console, shard_dirs), argv)
    trials = Trials(directory, (), argv=argv)
    if "single" not in trials.known:
        trials.add("single", {})
    trials.start("single")
    trial_dir = directory / "trials" / "single"
    started = time.monotonic()
    console.print(f"training {space.experiment.backbone} ({space.experiment.adapter.method}), {task.fold.description}")

    def show(record: folder.Record) -> None:
        console.print(folder.describe_epoch(record, space.tune.metric))

    actors = 0 if here else cluster.capacity(space)
    planned = cache.plan(space.model_copy(update={"search": {}}))
    with open_trial(space, space.experiment, planned, shard_dirs, trial_dir, console, actors) as trial:
        if here:
            fit_here(trial, show)
        else:
            with _following(trial_dir, show):
                fit_on_ray(trial)
    row = folder.trial_row(trials.update("single", time.monotonic() - started, status="finished"))
    probe = the_probe([row["checkpoint"]])
    when = f"epoch {row['best_epoch']}{probe and ', ' + probe}"
    console.print(f"best dev UAR {row['dev_uar']:.3f} in {when}: {directory / row['checkpoint']}")
    return directory


def main(arguments: list[str]) -> int:
    """``ser-ray train SPACE.yaml [key=value ...]``."""
    if not arguments:
        raise UserError("name a search space, such as search_spaces/demo.yaml")
    space = cluster.settle_paths(config.load(arguments[0], arguments[1:]))
    console = Console(highlight=False, soft_wrap=True)
    if space.resources.workers > 0:
        cluster.connect(space)
    directory = train(space, console, ["train", *arguments])
    console.print(f"next: ser-ray evaluate {directory}")
    return 0


# -- below: how it is done


def _work(settings: dict[str, Any], tell: Tell | None = None) -> None:
    """What every worker runs; in local mode, where Ray Train passes nothing on, epochs go to ``tell``."""
    import torch
    from ray.train.torch import get_device

    from ser_ray.training import loop

    trial = Trial(**settings)
    experiment, task = trial.load()
    torch.set_num_threads(max(1, int(trial.cpus)))
    if 0 < trial.gpus < 1:  # a trial that takes more than its share fails by itself, not its neighbours
        torch.cuda.set_per_process_memory_fraction(trial.gpus)
    rank, size, directory = 0, 1, Path(trial.directory)
    if tell is None:
        context, tell = ray.train.get_context(), ray.train.report
        rank, size = context.get_world_rank(), context.get_world_size()
    train, dev = (feed.Tables(ray.train.get_dataset_shard(name), trial.resident) for name in (f"train_{rank}", "dev"))

    def on_epoch(record: folder.Record, save: loop.Save) -> None:
        if rank == 0:
            _write_epoch(directory, record, save)
        tell(record)

    loop.forget_peak()  # of the trial before, where a process trains one after the other
    model, content = trial.model(experiment, get_device())
    data = feed.data(experiment, task, train, dev, content, rank, size)
    try:
        loop.fit(model, data, on_epoch, trial.metric, _last_checkpoint(directory))
    except torch.OutOfMemoryError as error:
        share = f" (its share: {trial.gpus:g})" if trial.gpus < 1 else ""
        raise UserError(
            f"out of GPU memory{share}: lower batch_seconds ({experiment.batch_seconds:g}), set recompute to true, "
            "or raise resources.gpus_per_worker"
        ) from error
    finally:
        train.close()
        dev.close()


def _write_epoch(directory: Path, record: folder.Record, save: loop.Save) -> None:
    """An epoch's checkpoint and its line; of the earlier checkpoints the best stays."""
    if record in folder.trial_history(directory):
        return  # told again, as whoever watched may have died before it heard
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
    """That of the last epoch that was told; of one whose line is missing nobody has heard."""
    told = [directory / folder.checkpoint_name(record["epoch"]) for record in folder.trial_history(directory)]
    return next((path for path in reversed(told) if path.is_dir()), None)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """What cannot be written in the body is a StorageError."""
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
