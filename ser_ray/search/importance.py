"""Which searched keys the outcome hung on, by Optuna, from the trials of a results folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from ser_ray.config import SearchSpace
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.search import study

LEAST: Final = 8
"""Trials below which nothing is said: the better half of fewer is two or three."""
TOP: Final = 5
"""Trials that the method should see among the best, as Optuna advises."""


@dataclass(frozen=True)
class Importances:
    """Searched key -> its share of what tells the best trials from the rest; the shares sum to 1, largest first."""

    shares: Mapping[str, float]
    trials: int
    """How many they rest on."""
    top: int
    """How many of them count as the best."""


def importances(space: SearchSpace, tried: Iterable[TrialRecord]) -> Importances | None:
    """How much each key matters for being among the best trials by the metric alone, on the trials of this search.

    PED-ANOVA (arXiv 2304.10255; for keys that only some trials have, arXiv 2601.20800) compares where the best trials
    lie with where all of them do. None with fewer than `LEAST` trials that have a figure, one searched key, or
    figures that tell no trial from another.
    """
    alone = space.model_copy(update={"tune": space.tune.model_copy(update={"also": (), "warm_start": ()})})
    known = study.make(alone, tried)
    complete = known.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    keys = {key for trial in complete for key in trial.params}
    if len(complete) < LEAST or len(keys) < 2:
        return None
    share = min(0.5, max(0.1, TOP / len(complete)))
    values = sorted((float(trial.values[0]) for trial in complete), reverse=True)
    top = sum(
        value >= values[math.ceil(share * len(values)) - 1] for value in values
    )  # equals of the last belong to it
    if top == len(values):
        return None
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    raw = get_param_importances(known, evaluator=evaluator, normalize=False)
    total = sum(raw.values())
    if total <= 0:
        return None
    shares = {key: value / total for key, value in sorted(raw.items(), key=lambda item: -item[1])}
    return Importances(shares, trials=len(values), top=top)
