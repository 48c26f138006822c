"""Search: Ray Tune and Optuna over many trials, each a TorchTrainer; then evaluation by Ray actors, then the report.

    python -m ser_ray.tune [SPACE.yaml] [key=value ...]           # without a file: the embedded demo
    ray job submit --working-dir . -- python -m ser_ray.tune SPACE.yaml

The same command again continues an interrupted search, and shows the results of a finished one.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["tune", *sys.argv[1:]]))

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import ray.data
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from ser_ray import config, disk, report
from ser_ray.config import SearchSpace
from ser_ray.evaluate import evaluate
from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.evaluation.runs import finals, is_evaluated
from ser_ray.models import backbones
from ser_ray.protocols.task import Task
from ser_ray.runtime import cluster, feature_cache, feed, paths
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.results_folder import audit_task, open_results
from ser_ray.runtime.trial import run_trial
from ser_ray.runtime.watch import Watch
from ser_ray.schema import UserError
from ser_ray.train import make_plan, show_plan
from ser_ray.trials import study
from ser_ray.trials.records import Trials

TRAINABLE: Final = "SER_RAY_TRAINABLE"
"""If this is set, to module:function, a search calls that for every trial instead of `run_trial`, with the same
arguments: for tests of what happens around training."""
TUNE_STATE = ".tune"
"""Where Tune keeps its own state while it runs. It is never read: a search continues from its trials' folders."""


class OptunaSearcher(Searcher):
    """Gives trials to Tune: first the interrupted ones, then what the study suggests, until the budget is spent."""

    def __init__(self, space: SearchSpace, trials: Trials, gpus: float = 0.0) -> None:
        """``gpus``: how many GPUs a trial holds."""
        super().__init__(metric=f"best_{space.tune.metric}", mode="max")
        self.space, self.trials, self.gpus = space, trials, gpus
        self.study = study.make(space, trials)
        self.first = study.first_points(space)
        # Interrupted trials are open in the study as well, so that the sampler stays away from them.
        self.asked = {t.trial_id: study.begin(self.study, space, 0, t.values)[0] for t in trials if not t.over}
        self.live: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial; None: not yet; FINISHED: no more."""
        self._report_failed()
        waiting = [trial for trial in self.trials if not trial.over and trial.trial_id not in self.live.values()]
        if waiting:
            return self._hand_out(trial_id, waiting[0].trial_id)
        number = len(self.trials.known) + 1
        if number > self._most() or self._spent():
            return None if self.live else Searcher.FINISHED  # a running trial may be interrupted and come again
        point = self.first[number - 1] if number <= len(self.first) else None
        name = f"{number:03d}"
        self.asked[name], values = study.begin(self.study, self.space, number, point)
        self.trials.add(name, values)
        return self._hand_out(trial_id, name)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch to the study, whose sampler also uses trials that have not ended."""
        if not self.space.tune.also:  # Optuna accepts no such reports with several objectives
            self.asked[self.live[trial_id]].report(result[str(self.metric)], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report a trial's end to the study; if it ended with an error, `Watch` decides afterwards what follows."""
        name = self.live.pop(trial_id)
        if not error:
            record = self.trials.update(name)
            study.end(self.study, self.space, self.asked.pop(name), record)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the study is made from the trials."""

    restore = save

    def _hand_out(self, trial_id: str, name: str) -> dict[str, Any]:
        self.live[trial_id] = name
        return _begin(self.trials, name)

    def _report_failed(self) -> None:
        """Report new failures to the study: it must not count these trials as running when it suggests the next."""
        for name in [name for name in self.asked if name not in self.live.values() and self.trials.known[name].over]:
            study.end(self.study, self.space, self.asked.pop(name), self.trials.known[name])

    def _most(self) -> int:
        grid = self.space.tune.sampler == "grid"
        return min(self.space.tune.trials, len(self.first)) if grid else self.space.tune.trials

    def _spent(self) -> bool:
        budget = self.space.tune
        gpu_hours = sum(trial.seconds for trial in self.trials) * self.gpus / 3600
        return bool(
            (budget.hours is not None and self.trials.hours() >= budget.hours)
            or (budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours)
        )


class FixedQueue(Searcher):
    """Gives a fixed list of trials to Tune, the interrupted ones again."""

    def __init__(self, trials: Trials) -> None:
        super().__init__(metric="epoch", mode="max")
        self.trials, self.live = trials, dict[str, str]()

    def suggest(self, trial_id: str) -> Any:
        """The next trial that is not over."""
        for trial in self.trials:
            if not trial.over and trial.trial_id not in self.live.values():
                self.live[trial_id] = trial.trial_id
                return _begin(self.trials, trial.trial_id)
        return None if self.live else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note that the trial no longer runs."""
        del self.live[trial_id]

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the trials are in their folders."""

    restore = save


class ReplayingASHA(ASHAScheduler):
    """ASHA over our own epochs and the best metric so far; it replays the epochs of earlier sessions."""

    def __init__(self, space: SearchSpace, trials: Trials) -> None:
        super().__init__(
            time_attr="epoch",  # ours: training_iteration restarts at 1 when a trial is continued
            metric=f"best_{space.tune.metric}",
            mode="max",
            max_t=max(space.most_epochs(), space.tune.grace + 1),
            grace_period=space.tune.grace,
            reduction_factor=2,
        )
        self.trials = trials
        for trial in trials:
            if trial.over:
                self._replay(trial)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a new or a continued trial: the scheduler sees its earlier epochs first."""
        self._replay(self.trials.known[trial.config["trial_id"]])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial continues after an epoch."""
        return str(super().on_trial_result(tune_controller, _ours(trial), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial has ended."""
        super().on_trial_complete(tune_controller, _ours(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial never ran."""
        super().on_trial_remove(tune_controller, _ours(trial))

    def _replay(self, trial: TrialRecord) -> None:
        own = SimpleNamespace(trial_id=trial.trial_id)
        super().on_trial_add(None, own)
        for record in trial.history:
            super().on_trial_result(None, own, record)


def _ours(trial: Any) -> SimpleNamespace:
    """The trial under our id: under Tune's, a restarted trial would count twice in the rungs."""
    return SimpleNamespace(trial_id=trial.config["trial_id"])


def _begin(trials: Trials, name: str) -> dict[str, Any]:
    """Begin a trial's next attempt; returns the ``point`` for `run_trial`."""
    trial = trials.begin(name)
    return {"trial_id": name, "values": dict(trial.values), "halved": trial.halved}


def search(planned: RunPlan, task: Task, console: Console, argv: Sequence[str] = ()) -> None:
    """Run the trials, or what is left of them after an interruption.

    Raises UserError where the results folder can no longer be written, KeyboardInterrupt where the user stopped it.
    """
    space, directory = planned.space, planned.space.results_dir()
    trials = Trials(directory, space.search, argv=argv)
    trials.resume(space.trial)
    done = sum(trial.over for trial in trials)
    if trials.known:
        console.print(f"continuing the search in {directory}: {done} of {space.tune.trials} trials done")
    searcher = OptunaSearcher(space, trials, planned.allocation.worker.gpus * planned.allocation.workers)
    scheduler = FIFOScheduler() if space.tune.scheduler == "none" else ReplayingASHA(space, trials)
    _run(planned, trials, searcher, scheduler, _speech(planned, task), console)


def train_finals(planned: RunPlan, jobs: Iterable[TrialRecord], console: Console, argv: Sequence[str] = ()) -> None:
    """Train the finalists over folds and seeds, as `runs.finals` lists them; continued like a search."""
    trials = Trials(planned.space.results_dir(), planned.space.search, kind="finals", argv=argv)
    wanted = {job.trial_id: job.values for job in jobs}
    trials.resume(planned.space.trial, wanted)
    for trial_id in wanted.keys() - trials.known.keys():
        trials.add(trial_id, wanted[trial_id])
    left = sum(not trial.over for trial in trials)
    console.print(f"training the finalists over folds and seeds: {left} of {len(trials.known)} to do")
    if left:
        _run(planned, trials, FixedQueue(trials), FIFOScheduler(), {}, console)


def main(path: Path | None, overrides: list[str], dry_run: bool = False) -> int:
    """``ser-ray tune``: a search over a space, by default the embedded demo; with ``dry_run`` only its plan."""
    space = load_space(path or config.default_space(), overrides)
    if dry_run:
        console = report.terminal()
        cluster.connect(space)
        show_plan(make_plan(space, console, space.tune.trials)[0], console)
        return 0
    run(space, report.terminal(), ["tune", *([str(path)] if path else []), *overrides])
    return 0


def load_space(path: Path, overrides: list[str]) -> SearchSpace:
    """A space for `run`; the N of ``tune.trials=+N`` is added to the trials that the search of that name has already.

    Raises UserError for what does not fit, and for a space that trains without Ray.
    """
    relative = [text for text in overrides if text.startswith("tune.trials=+")]
    space = paths.resolve_paths(config.load(path, [text for text in overrides if text not in relative]))
    if space.resources.workers == 0:
        raise UserError("resources.workers: 0 runs one trial without Ray; use ser-ray train, or 1 for a search")
    home = space.results_dir()
    known = config.load(home / "search.yaml") if (home / "search.yaml").is_file() else space
    trials = max(space.tune.trials, known.tune.trials)
    if relative:
        more = relative[-1].partition("+")[2]
        if not more.isdigit():
            raise UserError(f"{relative[-1]!r}: write tune.trials=+20 to add 20 trials to a search")
        over = [trial for trial in folder.read_trials(home / "trials") if trial.over]
        # An unfinished search is finished first: the same command, given again after a kill, adds nothing.
        trials += int(more) if len(over) >= trials and is_evaluated(home, known) else 0
    return space.model_copy(update={"tune": space.tune.model_copy(update={"trials": trials})})


def run(space: SearchSpace, console: Console, argv: list[str]) -> Path:
    """Run a search, or what is left of one: prepare, search, evaluate, report; returns its results folder."""
    started = time.monotonic()
    console.print(f"[bold]ser-ray tune[/bold] {space.experiment.name} -> {space.results_dir()}")
    _check_backbones(space, console)
    cluster.connect(space)
    planned, task = make_plan(space, console, space.tune.trials)
    findings = audit_task(space, task, console, map(Path, planned.shard_dirs))
    directory = space.results_dir()
    with folder.alone(directory):
        open_results(space, planned, findings, argv)
        if is_evaluated(directory, space):
            more = "tune.trials=+20 adds trials, a larger experiment.epochs epochs"
            console.print(f"this search is finished; showing its results ({more})")
        else:
            _search_and_evaluate(planned, task, console, argv)
            _close(directory, time.monotonic() - started)
        report.build(directory)
        report.print_summary(directory, console)
    return directory


# -- below: how it is done


def _search_and_evaluate(planned: RunPlan, task: Task, console: Console, argv: list[str]) -> None:
    space = planned.space
    directory = space.results_dir()
    with feature_cache.made_first(planned, console) if planned.cached_first() else nullcontext():
        names = ", ".join(space.search) or "nothing"
        console.print(f"searching {names}: {space.tune.trials} trials of up to {space.experiment.epochs} epochs")
        search(planned, task, console, argv)
        if jobs := finals(directory, space, task):
            train_finals(planned, jobs, console, argv)
    evaluate(directory, space, console, argv, reuse=True, allocation=planned.allocation)


def _run(
    planned: RunPlan,
    trials: Trials,
    searcher: Searcher,
    scheduler: TrialScheduler,
    speech: Mapping[str, ray.data.Dataset],
    console: Console,
) -> None:
    at_once = planned.allocation.trials_at_once
    watch = Watch(planned.space, trials, at_once, console)
    trainable = tune.with_resources(
        tune.with_parameters(_trainable(), plan=planned, kind=trials.kind, speech=speech),
        _resources(planned.allocation),
    )
    state = trials.results_dir / TUNE_STATE
    shutil.rmtree(state, ignore_errors=True)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=sys.maxsize,
            max_concurrent_trials=at_once,
            search_alg=searcher,
            scheduler=scheduler,
            reuse_actors=True,  # starting a process and importing torch and transformers takes eight seconds
        ),
        run_config=tune.RunConfig(name=state.name, storage_path=str(state.parent), verbose=0, callbacks=[watch]),
    )
    try:
        with watch.shown(), _every_death_heeded():
            tuner.fit()
    except tune.TuneError:
        if trials.error is None:
            raise
    except KeyboardInterrupt:
        trials.release()
        raise
    finally:
        shutil.rmtree(state, ignore_errors=True)
    if trials.error is not None:
        raise trials.error
    # After Ctrl-C Tune returns without an error, with unfinished trials.
    if any(not trial.over for trial in trials):
        trials.release()
        raise KeyboardInterrupt


@contextmanager
def _every_death_heeded() -> Iterator[None]:
    """Make Tune survive every death of an actor. By itself it continues only after a RayActorError: a process that Ray
    killed for its memory, or that was lost with its node, raises another error, which ends all trials (RayActorManager
    of Ray 2.60)."""
    original = RayActorManager._actor_task_failed

    def heeded(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = RayActorError(error_msg=f"{kind.__module__}.{kind.__name__}: {exception}")
        original(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = heeded
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


def _trainable() -> Callable[..., None]:
    """`run_trial`, or the function that `TRAINABLE` names."""
    module, _, function = os.environ.get(TRAINABLE, "").partition(":")
    return getattr(importlib.import_module(module), function) if module else run_trial


def _resources(allocation: Allocation) -> dict[str, float]:
    """Resources of a trial's process: those of its only worker. With several it just waits; they have their own."""
    one = allocation.worker
    return {"cpu": one.cpus, "gpu": one.gpus} if allocation.workers == 1 else {"cpu": 0.01}


def _speech(planned: RunPlan, task: Task) -> dict[str, ray.data.Dataset]:
    """The waveforms that trials share, as far as they stay in the object store; none if all trials read a cache."""
    space = planned.space
    needed = bool(planned.uncacheable_reasons())
    return feed.load_resident(task, feed.resident_splits(space, task, None), "audio") if needed else {}


def _check_backbones(space: SearchSpace, console: Console) -> None:
    """Load every backbone that the space names once before any trial, so that a missing one is an error here."""
    for name in space.backbones():
        backbone = backbones.load(name)
        millions = sum(p.numel() for p in backbone.parameters()) / 1e6
        console.print(f"backbone {name}: {backbone.family}, {backbone.num_layers} layers, {millions:.1f} M parameters")


def _close(directory: Path, seconds: float) -> None:
    provenance = disk.read_json(directory / "provenance.json")
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seconds": round(seconds, 1)}
    disk.write_json(directory / "provenance.json", provenance | finished)
