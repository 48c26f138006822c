"""What Ray Tune asks which trial to run next, and which to stop: a searcher over an Optuna study, one over a fixed list
of trials, and ASHA. All three are made from the trials in the results folder: so a search continues where it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from ser_ray.config import SearchSpace
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.trials import study
from ser_ray.trials.records import Trials


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

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: `save` wrote nothing."""

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

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing: `save` wrote nothing."""


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


# -- below: how it is done


def _ours(trial: Any) -> SimpleNamespace:
    """The trial under our id: under Tune's, a restarted trial would count twice in the rungs."""
    return SimpleNamespace(trial_id=trial.config["trial_id"])


def _begin(trials: Trials, name: str) -> dict[str, Any]:
    """Begin a trial's next attempt; returns the ``point`` for `run_trial`."""
    trial = trials.begin(name)
    return {"trial_id": name, "values": dict(trial.values), "halved": trial.halved}
