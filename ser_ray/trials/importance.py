"""Which searched keys mattered most, by Optuna's importance on the trials of a results folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from ser_ray.config import SearchSpace
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.trials import study

LEAST: Final = 8
"""Minimum number of trials for an answer: the better half of fewer is two or three."""
TOP: Final = 5
"""Number of best trials that the method should have, as Optuna advises."""


@dataclass(frozen=True)
class Importances:
    """Searched key -> its share of what separates the best trials from the rest; shares sum to 1, largest first."""

    shares: Mapping[str, float]
    trials: int
    """Number of trials that they are computed from."""
    top: int
    """Number of those that count as the best."""


def importances(space: SearchSpace, trials: Iterable[TrialRecord]) -> Importances | None:
    """How much each key matters for being among the best trials by the metric alone, on the trials of this search.

    PED-ANOVA (arXiv 2304.10255; for keys that only some trials have, arXiv 2601.20800) compares the distribution of the
    best trials with that of all trials. None if fewer than `LEAST` trials have a metric, if only one key is searched,
    or if the metric does not separate the trials.
    """
    alone = space.model_copy(update={"tune": space.tune.model_copy(update={"also": (), "warm_start": ()})})
    known = study.make(alone, trials)
    complete = known.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    keys = {key for trial in complete for key in trial.params}
    if len(complete) < LEAST or len(keys) < 2:
        return None
    share = min(0.5, max(0.1, TOP / len(complete)))
    values = sorted((float(trial.values[0]) for trial in complete), reverse=True)
    top = sum(
        value >= values[math.ceil(share * len(values)) - 1] for value in values
    )  # those that tie with the last one included
    if top == len(values):
        return None
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    raw = get_param_importances(known, evaluator=evaluator, normalize=False)
    total = sum(raw.values())
    if total <= 0:
        return None
    shares = {key: value / total for key, value in sorted(raw.items(), key=lambda item: -item[1])}
    return Importances(shares, trials=len(values), top=top)
