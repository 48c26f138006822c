"""The Optuna study of a search, which is built from the trials in the results folder.

So nothing has to be saved besides the trials themselves. A search that was killed at any moment, one that is extended
and one that starts from the trials of earlier searches all build their study in the same way; no pickle is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from ser_ray import config
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import Record, TrialRecord, costs
from ser_ray.schema import UserError
from ser_ray.trials import points

STARTUP: Final = (4, 10)
"""Minimum and maximum number of random points before TPE starts; between these limits, a third of the trials."""


def make(space: SearchSpace, trials: Iterable[TrialRecord]) -> optuna.Study:
    """A study with the trials that are over, and those of ``tune.warm_start``.

    Raises UserError if a folder of ``tune.warm_start`` has no trials of a search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        directions=["maximize", *("minimize" for _ in space.tune.also)], sampler=_sampler(space, 0)
    )
    for earlier in space.tune.warm_start:
        for trial in _earlier(Path(earlier)):
            if (known := frozen(space, trial)) is not None:
                study.add_trial(known)
    for trial in trials:
        if trial.over and (known := frozen(space, trial)) is not None:
            study.add_trial(known)
    return study


def begin(
    study: optuna.Study, space: SearchSpace, number: int, point: Mapping[str, Any] | None
) -> tuple[optuna.Trial, points.Point]:
    """Open the ``number``-th trial at ``point``, whose missing keys are sampled, or at one that the sampler chooses.

    What is sampled depends on the seed, the number and the trials in the study: a search that was interrupted and
    continued tries the same points as an uninterrupted one.
    """
    study.sampler = _sampler(space, number)
    if point is not None:
        study.enqueue_trial({key: points.encode(value) for key, value in point.items()})
    trial = study.ask()
    return trial, points.ask(trial, space.search)


def end(study: optuna.Study, space: SearchSpace, trial: optuna.Trial, record: TrialRecord) -> None:
    """Report the result of a trial to the study."""
    values = objectives(space, record.history)
    if values is None or record.status == "failed":
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, list(values))


def objectives(space: SearchSpace, history: Sequence[Record]) -> tuple[float, ...] | None:
    """What the study compares trials by: the best dev metric so far, and the costs of ``tune.also``; None before the
    first epoch. The best so far, because a trial that is stopped early counts with what it reached."""
    if not history:
        return None
    cost = costs(history)
    return (float(history[-1][f"best_{space.tune.metric}"]), *(cost[name] for name in space.tune.also))


def frozen(space: SearchSpace, record: TrialRecord) -> FrozenTrial | None:
    """A trial that is over, as an Optuna trial; None if a value is outside of the space, as one of an earlier search
    may be."""
    params, distributions = {}, {}
    for key, value in record.values.items():
        if key not in space.search:
            return None
        distribution = points.as_optuna(space.search[key])
        encoded = points.encode(value)
        inside = encoded in getattr(distribution, "choices", (encoded,)) and _within(distribution, encoded)
        if not inside:
            return None
        params[key], distributions[key] = encoded, distribution
    values = objectives(space, record.history)
    if values is None or record.status == "failed":
        return create_trial(state=TrialState.FAIL, params=params, distributions=distributions)
    return create_trial(
        values=list(values),
        params=params,
        distributions=distributions,
        intermediate_values={r["epoch"]: r[f"best_{space.tune.metric}"] for r in record.history},
    )


def first_points(space: SearchSpace) -> list[points.Point]:
    """The points to try before the sampler chooses any: those of ``tune.first``, or all of a grid."""
    if space.tune.sampler == "grid":
        return points.grid(space.search, space.tune.grid_points, space.tune.seed)
    return [dict(point) for point in space.tune.first]


def _sampler(space: SearchSpace, number: int) -> optuna.samplers.BaseSampler:
    seed = int(config.fingerprint(space.tune.seed, number), 16) % 2**32
    if space.tune.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    least, most = STARTUP
    return optuna.samplers.TPESampler(
        seed=seed,
        multivariate=True,
        group=True,  # conditional keys
        constant_liar=True,  # keeps trials that run at the same time apart
        n_startup_trials=max(least, min(most, space.tune.trials // 3)),
    )


def _within(distribution: optuna.distributions.BaseDistribution, value: Any) -> bool:
    low, high = getattr(distribution, "low", None), getattr(distribution, "high", None)
    return low is None or high is None or (isinstance(value, int | float) and low <= value <= high)


def _earlier(results_dir: Path) -> list[TrialRecord]:
    if not (results_dir / "trials").is_dir():
        raise UserError(f"tune.warm_start: {results_dir}: not a results folder of a search; give results/<name>")
    return [trial for trial in folder.read_trials(results_dir / "trials") if trial.over]
