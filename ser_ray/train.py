"""Train one trial: a TorchTrainer around `ser_ray.training.loop`, fed by Ray Data; or in this process, without Ray.

python -m ser_ray.train SPACE.yaml [key=value ...]
python -m ser_ray.train SPACE.yaml resources.workers=0        # in this process: breakpoints work
"""

from __future__ import annotations

if __name__ == "__main__":  # hand over at once, so that workers find everything in ser_ray.train, not in __main__
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["train", *sys.argv[1:]]))

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from ser_ray import config, prepare
from ser_ray.config import Experiment, SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.results import the_probe
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import cluster, feature_cache, paths, plan
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.results_folder import audit_task, open_results
from ser_ray.runtime.trial import fit_here, fit_on_ray, memory_explained, open_trial
from ser_ray.schema import MemoryShortageError
from ser_ray.terminal import PlainConsole
from ser_ray.trials.records import Trials


def train(space: SearchSpace, console: Console, argv: list[str]) -> Path:
    """Prepare data and train one trial, up to its row in ``trials.csv``; returns its results folder.

    Runs on the Ray that `cluster.connect` joined, or in this process if ``resources.workers`` is 0. An interrupted
    trial is continued, and so is one that ran all its epochs if ``experiment.epochs`` has grown.

    Raises UserError, also where another process works on that folder.
    """
    planned, task = make_plan(alone(space), console)
    findings = audit_task(planned.space, task, console, map(Path, planned.shard_dirs))
    with folder.alone(space.results_dir()):
        directory = open_results(space.over(task.emotions), planned, findings, argv)
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
                with memory_explained(trial):
                    fit_here(trial, show)
            else:
                allocation = planned.allocation
                cluster.wait_for_room(allocation.worker, allocation.workers, allocation.wanted, console)
                with _following(planned, trial_dir, show, console):
                    fit_on_ray(trial)

    with nullcontext() if here else feature_cache.made_first(planned, console):
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
    allocation = cluster.allocate_here() if here else cluster.allocate(space, trials, console, share=True)
    if not here:
        at_once = f"{allocation.trials_at_once} trial{'s' * (allocation.trials_at_once != 1)} at once"
        said = (f"Ray: {cluster.describe()}", at_once, allocation.sharing, *allocation.idle)
        console.print("; ".join(filter(None, said)))
    shard_dirs = prepare.prepare(space, use_ray=not here, console=console)
    task = load_task(space.experiment, shard_dirs)
    if task.absent:
        console.print(task.absent)
    return plan.make(space, allocation, shard_dirs, task), task


def main(path: Path, overrides: list[str], dry_run: bool = False) -> int:
    """``ser-ray train``: one trial; with ``dry_run`` only its plan."""
    space = paths.resolve_paths(config.load(path, overrides))
    console = PlainConsole()
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
    console.print(f"plan of {planned.space.experiment.name}; nothing is trained")
    for line in planned.lines():
        console.print(f"  {line}")


# -- below: how it is done


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


@contextmanager
def _following(
    planned: RunPlan, directory: Path, show: Callable[[folder.Record], None], console: Console
) -> Iterator[None]:
    """While the body trains, show every line that is added to a trial's history; before the first, say now and then
    that the workers wait for room on the cluster, if others took it just before them."""
    allocation = planned.allocation
    ended = threading.Event()
    seen = len(folder.trial_history(directory))

    def follow() -> None:
        shown, next_look = seen, time.monotonic() + cluster.LOOK_S
        while True:
            last_look = ended.wait(0.5)
            for record in folder.trial_history(directory)[shown:]:
                show(record)
                shown += 1
            if last_look:
                return
            if shown == seen and time.monotonic() > next_look:
                waits = cluster.trainers_waiting(allocation.workers)
                if waits:
                    console.print(f"  ... {cluster.waiting_for(allocation.wanted)}")
                next_look = time.monotonic() + (cluster.REPEAT_S if waits else cluster.LOOK_S)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
