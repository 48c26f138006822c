"""Which trained models are compared: the finalists of a search, each over folds and seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ser_ray import config, disk
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.protocols.finals import dev_after, final_runs
from ser_ray.protocols.task import Task
from ser_ray.schema import UserError


@dataclass(frozen=True)
class Run:
    """One trained model of a finalist."""

    trial_id: str
    fold: int
    seed: int
    checkpoint: str
    """Path inside the results folder; empty while it is not trained."""
    soup: bool = False
    """Whether its weights are the mean of those of all seeds (`ser_ray.models.soup`)."""

    def __str__(self) -> str:
        return f"trial {self.trial_id}, " + ("mean weights of its seeds" if self.soup else f"seed {self.seed}")


def finals(directory: Path, space: SearchSpace, task: Task) -> list[TrialRecord]:
    """The trainings that are needed before the choice: the finalists over folds and seeds, except those that the
    search itself trained."""
    jobs = []
    for finalist in finalists_of(directory, space):
        for run in runs_of(space, task, finalist):
            if run.checkpoint == "":
                jobs.append(TrialRecord(_final_id(run), {**finalist.values, **_where(space, run)}))
    return jobs


def is_evaluated(directory: Path, space: SearchSpace) -> bool:
    """Whether test.json holds the test metrics of this search with this budget."""
    path = directory / "evaluation" / "test.json"
    return path.is_file() and disk.read_json(path).get("budget") == budget(space)


def finalists_of(directory: Path, space: SearchSpace) -> list[TrialRecord]:
    """The best trials on dev, as many as ``tune.finalists``. Raises UserError if no trial left a checkpoint."""
    trials = [trial for trial in folder.read_trials(directory / "trials") if trial.best and trial.status != "failed"]
    if not trials:
        raise UserError(f"{directory}: no trial left a checkpoint; trials.csv says how each ended")
    trials.sort(key=lambda trial: (-float(trial.best[space.tune.metric]), trial.trial_id))
    return trials[: space.tune.finalists]


def runs_of(space: SearchSpace, task: Task, finalist: TrialRecord) -> list[Run]:
    """The models that a finalist is compared by, its own fold and seed first; one still to train has no checkpoint.

    What the search itself finished is not trained again.
    """
    own = (space.experiment.protocol.fold, space.experiment.seed)
    pairs = final_runs(space, task.unsplit)
    trained = f"trials/{finalist.trial_id}/{folder.checkpoint_name(finalist.best['epoch'])}"
    reused = own if finalist.status == "finished" or pairs == [own] else None
    return [Run(finalist.trial_id, *pair, trained if pair == reused else "") for pair in pairs]


def trained(directory: Path, runs: Iterable[Run]) -> list[Run]:
    """The same runs, with the checkpoints of the finals that have been trained."""
    known = {final.trial_id: final for final in folder.read_trials(directory / "finals")}
    complete = []
    for run in runs:
        if run.checkpoint == "":
            final = known.get(_final_id(run))
            if final is None or final.status != "finished":
                state = "missing" if final is None else f"{final.status} {final.error}"
                raise UserError(f"{directory}/finals/{_final_id(run)}: {state}; run ser-ray tune again")
            name = folder.checkpoint_name(final.best["epoch"])
            run = Run(run.trial_id, run.fold, run.seed, f"finals/{_final_id(run)}/{name}")
        complete.append(run)
    return complete


def budget(space: SearchSpace) -> dict[str, Any]:
    """The settings that say how much is trained; a search in which they have changed is evaluated again."""
    names: tuple[str, ...] = ("trials", "hours", "gpu_hours", "finalists", "final_folds", "final_seeds", "rotate_dev")
    # Without an ensemble as in the records of older versions, which had none.
    names += ("ensemble",) if space.tune.ensemble else ()
    return {name: config.to_dict(space.tune)[name] for name in names} | {"epochs": space.experiment.epochs}


# -- below: how it is done


def _where(space: SearchSpace, run: Run) -> dict[str, Any]:
    """The settings of a run that differ from its finalist's, as dotted keys."""
    own = {"protocol.fold": run.fold, "seed": run.seed}
    if not space.tune.rotate_dev:
        return own
    return own | {"protocol.dev_after": dev_after(space, run.seed)}


def _final_id(run: Run) -> str:
    return f"{run.trial_id}-fold{run.fold}-seed{run.seed}"
