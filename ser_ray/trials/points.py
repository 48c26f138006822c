"""Points of a search space: suggested by Optuna key by key, given by the user, or laid out as a grid.

A point is a mapping from searched keys to values, without the keys whose conditions (``when``) do not hold.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from ser_ray.config import Distribution

Point = dict[str, Any]


def ask(trial: optuna.trial.Trial, search: Mapping[str, Distribution]) -> Point:
    """Ask a study's trial for every key whose conditions hold."""
    point: Point = {}
    for key, distribution in search.items():
        if _applies(distribution, point):
            point[key] = _suggest(trial, key, distribution)
    return point


def as_optuna(distribution: Distribution) -> BaseDistribution:
    """The same distribution as an Optuna object."""
    if distribution.choice is not None:
        return CategoricalDistribution([encode(value) for value in distribution.choice])
    if distribution.randint is not None:
        return IntDistribution(*distribution.randint)
    low, high = distribution.uniform or distribution.loguniform or (0.0, 0.0)
    return FloatDistribution(low, high, log=distribution.loguniform is not None)


def encode(value: Any) -> Any:
    """A value as it is passed to Optuna: its categories must be scalars, so a list becomes JSON.

    >>> encode(["q_proj", "v_proj"]), encode(0.1)
    ('["q_proj", "v_proj"]', 0.1)
    """
    return value if isinstance(value, bool | int | float | str | None) else json.dumps(value)


def grid(search: Mapping[str, Distribution], per_range: int, seed: int) -> list[Point]:
    """Every combination of choices and of ``per_range`` values of each range (evenly spaced, or in their logarithm).

    The order is shuffled by ``seed``, so that a grid that is cut short covers the whole space.

    >>> space = {"a": Distribution(choice=("x", "y")), "b": Distribution(uniform=(0.0, 1.0), when={"a": ("x",)})}
    >>> sorted(map(str, grid(space, 2, seed=0)))
    ["{'a': 'x', 'b': 0.0}", "{'a': 'x', 'b': 1.0}", "{'a': 'y'}"]
    """
    distinct: dict[str, Point] = {}
    for values in itertools.product(*(_levels(distribution, per_range) for distribution in search.values())):
        point: Point = {}
        for (key, distribution), value in zip(search.items(), values, strict=True):
            if _applies(distribution, point):
                point[key] = value
        distinct.setdefault(json.dumps(point), point)
    order = np.random.default_rng(seed).permutation(len(distinct))
    points = list(distinct.values())
    return [points[i] for i in order]


def _applies(distribution: Distribution, point: Point) -> bool:
    return all(point.get(name) in allowed for name, allowed in distribution.when.items())


def _suggest(trial: optuna.trial.Trial, key: str, distribution: Distribution) -> Any:
    if distribution.choice is not None:
        encoded = trial.suggest_categorical(key, [encode(value) for value in distribution.choice])
        return next(value for value in distribution.choice if encode(value) == encoded)
    if distribution.randint is not None:
        return trial.suggest_int(key, *distribution.randint)
    low, high = distribution.uniform or distribution.loguniform or (0.0, 0.0)
    return trial.suggest_float(key, low, high, log=distribution.loguniform is not None)


def _levels(distribution: Distribution, per_range: int) -> Sequence[Any]:
    if distribution.choice is not None:
        return distribution.choice
    if distribution.randint is not None:
        low, high = distribution.randint
        return sorted({round(value) for value in np.linspace(low, high, per_range).tolist()})
    if distribution.loguniform is not None:
        return list(np.geomspace(*distribution.loguniform, per_range).tolist())
    assert distribution.uniform is not None
    return list(np.linspace(*distribution.uniform, per_range).tolist())
