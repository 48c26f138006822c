"""Search: Ray Tune and Optuna over many trials, each a TorchTrainer; then evaluation by Ray actors, then the report.

    python -m ser_ray.tune [SPACE.yaml] [key=value ...]           # without a file: the embedded demo
    ray job submit --working-dir . -- python -m ser_ray.tune SPACE.yaml

The same command again continues an interrupted search, and shows the results of a finished one.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["tune", *sys.argv[1:]]))

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import ray.data
from ray.tune.schedulers import FIFOScheduler
from rich.console import Console

from ser_ray import config, disk, report
from ser_ray.config import SearchSpace
from ser_ray.evaluate import evaluate
from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.evaluation.runs import finals, is_evaluated
from ser_ray.models import backbones
from ser_ray.protocols.task import Task
from ser_ray.runtime import cluster, feature_cache, feed, paths, tuner
from ser_ray.runtime.contact import LOST
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.results_folder import audit_task, open_results
from ser_ray.runtime.searchers import FixedQueue, OptunaSearcher, ReplayingASHA
from ser_ray.schema import LostMessageError, UserError
from ser_ray.terminal import titled
from ser_ray.train import make_plan, show_plan
from ser_ray.trials.records import Trials

REJOINS: Final = 5
"""How often a search joins Ray anew by itself: a message is rarely lost, and where it happens again there is another
reason."""


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
    """Run a search, or what is left of one: prepare, search, evaluate, report; returns its results folder.

    Where Ray has lost a message, the search is continued over a new connection to it.
    """
    started = time.monotonic()
    for _ in range(REJOINS):
        try:
            return _run(space, console, argv, started)
        except LostMessageError:
            if not cluster.leave():
                raise
            console.print(f"{LOST}; joining Ray anew, trials go on from their last epochs", style="yellow")
    return _run(space, console, argv, started)


def _run(space: SearchSpace, console: Console, argv: list[str], started: float) -> Path:
    console.print(titled("ser-ray tune", f" {space.experiment.name} -> {space.results_dir()}"))
    _check_backbones(space, console)
    cluster.connect(space)
    planned, task = make_plan(space, console, space.tune.trials)
    space = space.over(task.emotions)
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
    tuner.run(planned, trials, searcher, scheduler, _speech(planned, task), console)


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
        tuner.run(planned, trials, FixedQueue(trials), FIFOScheduler(), {}, console)


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
