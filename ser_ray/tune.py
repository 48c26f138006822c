"""Search: Ray Tune and Optuna over many trials, each a TorchTrainer; then evaluation actors choose, then the report.

    python -m ser_ray.tune [SPACE.yaml] [key=value ...]           # without a file: the embedded demo
    ray job submit --working-dir . -- python -m ser_ray.tune SPACE.yaml

The same command again continues an interrupted search, and shows a finished one.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["tune", *sys.argv[1:]]))

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import ray.data
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from ser_ray import cache, cluster, config, disk, feed, prepare, report
from ser_ray.config import Distribution, SearchSpace
from ser_ray.evaluate import evaluate
from ser_ray.evaluation import folder
from ser_ray.models import backbones
from ser_ray.protocols.task import Task, load_task
from ser_ray.schema import UserError
from ser_ray.speech import shards
from ser_ray.train import audit_task, describe_epoch, open_results, run_trial

STATE = "tune_state"
"""Tune's own folder inside the results: what an interrupted search continues from."""
HEARTBEAT_S = 20.0
"""A line at least this often while trials run, since an epoch of a large backbone takes minutes."""


class Suggest:
    """The search as Optuna's define-by-run function: picklable, and conditional through ``when``."""

    def __init__(self, search: dict[str, Distribution]) -> None:
        self.search = search

    def __call__(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """Ask the sampler for every key whose conditions hold."""
        values: dict[str, Any] = {}
        for key, distribution in self.search.items():
            if all(values.get(name) in allowed for name, allowed in distribution.when.items()):
                values[key] = _suggest(trial, key, distribution)
        return values

    def encode(self, point: dict[str, Any]) -> dict[str, Any]:
        """A point of ``tune.first`` as Optuna's study knows it."""
        return {key: _encode(value) for key, value in point.items()}


class SafeOptunaSearch(OptunaSearch):
    """OptunaSearch that survives a result for a trial that the study has finished, as after a killed driver."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch's value to the study, unless the study has closed that trial already."""
        try:
            super().on_trial_result(trial_id, result)
        except optuna.exceptions.UpdateFinishedTrialError:
            logging.getLogger(__name__).info("trial %s is finished in the study", trial_id)


class Progress(tune.Callback):
    """Lines for people, and ``trials.csv`` after every epoch."""

    def __init__(self, space: SearchSpace, directory: Path, console: Console) -> None:
        self.space, self.directory, self.console = space, directory, console
        known = folder.read_trials(directory) if (directory / "trials.csv").is_file() else []
        self.rows: dict[str, folder.Record] = {row["trial_id"]: dict(row) for row in known}
        self.numbers = {trial_id: number for number, trial_id in enumerate(self.rows, start=1)}
        self.last_line = time.monotonic()
        self.noted: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks with its state; a terminal cannot be, and a continued search brings its own."""
        return self.__dict__ | {"console": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what a trial will try."""
        self._update(trial, "running")
        self._say(trial, "starts: " + ", ".join(f"{k}={_short(v)}" for k, v in trial.config.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say how an epoch went."""
        self._update(trial, "finished" if result["last"] else "running")
        self._say(trial, describe_epoch(result, self.space.tune.metric))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how a trial ended: by itself, or stopped by the scheduler."""
        ended = trial.last_result.get("last", False)
        self._update(trial, "finished" if ended else "stopped")
        done = sum(row["status"] != "running" for row in self.rows.values())
        self._say(
            trial,
            f"{'finished' if ended else 'stopped by the scheduler'}; {done} of {self.space.tune.trials} trials done",
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why a trial failed."""
        reason = str(trial.get_error() or "unknown").strip().splitlines()[-1]
        self._update(trial, "failed", reason)
        self._say(trial, f"failed: {reason}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """What trials say before their first epoch, and a sign of life while epochs are long."""
        running = [trial for trial in trials if trial.status == "RUNNING"]
        for trial in running:
            self._pass_on_notes(trial)
        if running and time.monotonic() - self.last_line > HEARTBEAT_S:
            waiting = ", ".join(f"{self._number(t)} in epoch {self._epochs(t) + 1}" for t in running)
            self.console.print(f"  ... running: trial {waiting}", style="dim")
            self.last_line = time.monotonic()

    def _pass_on_notes(self, trial: Any) -> None:
        path = self.directory / "trials" / trial.trial_id / folder.NOTES
        notes = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for note in notes[self.noted.get(trial.trial_id, 0) :]:
            self._say(trial, note)
        self.noted[trial.trial_id] = len(notes)

    def _epochs(self, trial: Any) -> int:
        return int(trial.last_result.get("epoch", 0)) if trial.last_result else 0

    def _number(self, trial: Any) -> int:
        return self.numbers.setdefault(trial.trial_id, len(self.numbers) + 1)

    def _update(self, trial: Any, status: str, error: str = "") -> None:
        seconds = (trial.last_result or {}).get("time_total_s", 0.0)
        values = {key: trial.config.get(key, "") for key in self.space.search}
        row = folder.trial_row(self.directory, trial.trial_id, status, values, seconds)
        self.rows[trial.trial_id] = row | {"error": error}
        folder.write_trials(self.directory, self.rows.values())

    def _say(self, trial: Any, text: str) -> None:
        self.console.print(f"[bold]trial {self._number(trial):2d}[/bold] {trial.trial_id}  {text}")
        self.last_line = time.monotonic()


def search(space: SearchSpace, task: Task, shard_dirs: list[Path], directory: Path, console: Console) -> None:
    """Run the trials, or what is left of them after an interruption."""
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial,
            space=config.to_dict(space),
            shard_dirs=[str(shard_dir) for shard_dir in shard_dirs],
            directory=str(directory),
            planned=cache.plan(space),
            speech=_speech(space, task, shard_dirs),
        ),
        # The driver of a trial only waits; its workers have a placement group of their own.
        {"cpu": 0.01},
    )
    state = directory / STATE
    progress = Progress(space, directory, console)
    if tune.Tuner.can_restore(str(state)):
        console.print(f"continuing the search in {directory}")
        tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, restart_errored=True)
        tuner._local_tuner._run_config.callbacks = [progress]
    else:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=space.tune.trials,
                max_concurrent_trials=cluster.concurrency(space),
                search_alg=_searcher(space),
                scheduler=_scheduler(space),
            ),
            run_config=tune.RunConfig(name=STATE, storage_path=str(directory), verbose=0, callbacks=[progress]),
        )
    tuner.fit()
    # Tune returns quietly from a Ctrl-C, with trials half done.
    ended = [row for row in progress.rows.values() if row["status"] != "running"]
    if len(ended) < space.tune.trials:
        raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """``ser-ray tune [SPACE.yaml] [key=value ...]``."""
    has_file = bool(arguments) and "=" not in arguments[0]
    path = Path(arguments[0]) if has_file else config.default_space()
    space = cluster.settle_paths(config.load(path, arguments[has_file:]))
    if space.resources.workers == 0:
        raise UserError("resources.workers: 0 runs one trial without Ray; use ser-ray train, or 1 for a search")
    console = report.terminal()
    started = time.monotonic()
    console.print(f"[bold]ser-ray tune[/bold] {path} -> {space.results_dir()}")
    _check_backbones(space, console)
    cluster.connect()
    at_once = cluster.concurrency(space)
    console.print(f"Ray: {cluster.describe()}; {at_once} trial{'s' * (at_once != 1)} at once")
    shard_dirs = prepare.prepare(space, console=console)
    task = load_task(space.experiment, shard_dirs)
    findings = audit_task(task, console, shard_dirs)
    directory = open_results(space, shard_dirs, findings, ["tune", *arguments])
    if not (directory / "evaluation" / "test.json").is_file():
        console.print(
            f"searching {', '.join(space.search)}: {space.tune.trials} trials of up to {space.experiment.epochs} epochs"
        )
        search(space, task, shard_dirs, directory, console)
        evaluate(directory, space, console, ["tune", *arguments])
        _close(directory, time.monotonic() - started)
    else:
        console.print("this search is finished; showing its results")
    report.build(directory)
    report.print_summary(directory, console)
    return 0


# -- below: how it is done


def _suggest(trial: optuna.trial.Trial, key: str, distribution: Distribution) -> Any:
    if distribution.choice is not None:
        encoded = trial.suggest_categorical(key, [_encode(value) for value in distribution.choice])
        return next(value for value in distribution.choice if _encode(value) == encoded)
    if distribution.randint is not None:
        return trial.suggest_int(key, *distribution.randint)
    low, high = distribution.uniform or distribution.loguniform or (0.0, 0.0)
    return trial.suggest_float(key, low, high, log=distribution.loguniform is not None)


def _encode(value: Any) -> Any:
    """Optuna's categories are scalars: lists travel as JSON."""
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def _searcher(space: SearchSpace) -> SafeOptunaSearch:
    suggest = Suggest(space.search)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return SafeOptunaSearch(
        suggest,
        # The running best, since a trial that the scheduler stops is told to the study with its last value.
        metric=f"best_{space.tune.metric}",
        mode="max",
        points_to_evaluate=[suggest.encode(point) for point in space.tune.first] or None,
        sampler=optuna.samplers.TPESampler(
            seed=space.tune.seed,
            multivariate=True,
            group=True,  # conditional keys
            constant_liar=True,  # trials run at the same time: keep them apart
            n_startup_trials=max(4, min(10, space.tune.trials // 3)),
        ),
    )


def _scheduler(space: SearchSpace) -> TrialScheduler:
    if space.tune.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",  # ours: training_iteration starts again at 1 when a trial is continued
        metric=f"best_{space.tune.metric}",
        mode="max",
        max_t=max(space.experiment.epochs, space.tune.grace + 1),
        grace_period=space.tune.grace,
        reduction_factor=2,
    )


def _speech(space: SearchSpace, task: Task, shard_dirs: list[Path]) -> dict[str, ray.data.Dataset]:
    """The waveforms that trials share; not read before a trial asks, where all are fed by a frozen prefix."""
    paths = [path for shard_dir in shard_dirs for path in shards.shard_paths(shard_dir)]
    asked = any(cache.why_not(space, experiment) for experiment in cache.experiments(space))
    resident = asked and feed.stays_resident(space, paths)
    return feed.load_datasets(task, paths, "audio", max(1, space.resources.workers), resident)


def _check_backbones(space: SearchSpace, console: Console) -> None:
    """Load every backbone that the space names, once, before any trial: what is missing shows here."""
    searched = space.search["backbone"].examples() if "backbone" in space.search else ()
    for name in dict.fromkeys(searched or (space.experiment.backbone,)):
        backbone = backbones.load(name)
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        note = "; random weights, not pre-trained" if backbones.is_random(name) else ""
        console.print(
            f"backbone {name}: {backbone.family}, {backbone.num_layers} layers, {millions:.1f} M parameters{note}"
        )


def _close(directory: Path, seconds: float) -> None:
    provenance = disk.read_json(directory / "provenance.json")
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(seconds, 1)}
    disk.write_json(directory / "provenance.json", provenance | finished)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).rsplit("/", 1)[-1]
