"""Compare several searches: their differing settings, metrics and costs, and the gaps between them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ser_ray.config import to_dict
from ser_ray.disk import resolved
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.results import Results, as_number


@dataclass(frozen=True)
class Gap:
    """Test metrics of ``one`` minus those of ``other`` on the same utterances, with paired 95 % intervals; without
    metrics, the reason why they cannot be compared."""

    one: str
    other: str
    metrics: Mapping[str, Mapping[str, Any]]
    """Headline metric -> a record of `ser_ray.evaluation.gaps`."""
    no_gap_reason: str = ""


def labels(searches: Sequence[Results]) -> list[str]:
    """A label for each search: its name, or if two have the same name, its folder relative to their common parent."""
    names = [results.space.experiment.name for results in searches]
    if len(set(names)) == len(names):
        return names
    folders = [results.folder for results in searches]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]


def common_parent(folders: Sequence[Path]) -> Path:
    """The deepest folder that contains all of them."""
    return Path(os.path.commonpath([resolved(folder).parent for folder in folders]))


def differing(searches: Sequence[Results]) -> dict[str, list[str]]:
    """Dotted key of search.yaml -> its value in each search, for the keys in which they differ.

    Names and paths are left out, as are ``resources`` and ``storage``.
    """
    flat = []
    for results in searches:
        space = to_dict(results.space)
        experiment = {key: value for key, value in space["experiment"].items() if key != "name"}
        experiment["corpora"] = sorted(experiment["corpora"])
        flat.append(_flat(experiment) | _flat({key: space[key] for key in ("search", "tune")}))
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {key: [one.get(key, "") for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def costs(results: Results) -> dict[str, float | None]:
    """The cost of a search: the number of trials, their total seconds, and the costs of its winner."""
    seconds = [as_number(row.get("seconds")) for row in results.trials]
    winner = {
        key: as_number(results.leader.get(key))
        for key in ("seconds_per_epoch", "peak_memory_mb", "trainable_parameters")
    }
    return {"trials": float(len(results.trials)), "seconds": sum(s for s in seconds if s is not None)} | winner


def gaps(searches: Sequence[Results]) -> list[Gap]:
    """The gap of every pair of searches, first minus second, corrected for the number of pairs that are tested."""
    named = list(zip(labels(searches), searches, strict=True))
    pairs = [
        gap(one, other, first.predictions.get("test"), second.predictions.get("test"))
        for (one, first), (other, second) in itertools.combinations(named, 2)
    ]
    return [
        replace(pair, metrics=metrics)
        for pair, metrics in zip(pairs, corrected(pair.metrics for pair in pairs), strict=True)
    ]


def gap(one: str, other: str, first: Predictions | None, second: Predictions | None) -> Gap:
    """The paired gap of two searches on test, if both predicted the same utterances and the same set of emotions."""
    if first is None or second is None:
        return Gap(one, other, {}, f"{other if first is not None else one} has no test predictions yet")
    if first.emotions != second.emotions:
        return Gap(one, other, {}, "they classify different emotions")
    here, there = (np.argsort(np.asarray(p.utterance_ids), kind="stable") for p in (first, second))
    if [first.utterance_ids[i] for i in here] != [second.utterance_ids[i] for i in there]:
        return Gap(one, other, {}, "they were tested on different utterances")
    truth = first.labels[here]
    if not np.array_equal(truth, second.labels[there]):
        return Gap(one, other, {}, "the same utterances have different labels")
    speakers = [first.speakers[i] for i in here]
    if len(set(speakers)) < 2:
        return Gap(one, other, {}, "one test speaker is too few: gaps are tested over speakers")
    predicted = first.predicted[here], second.predicted[there]
    return Gap(one, other, gap_records(truth, *predicted, speakers, len(first.emotions)))


# -- below: how it is done


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text; a distribution with its conditions stays one value, as does a list of points."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix.startswith("search."):
            flat |= _flat(value, f"{dotted}.")
        elif isinstance(value, dict):
            flat[dotted] = ", ".join(f"{kind} {json.dumps(what)}" for kind, what in value.items() if what)
        else:
            flat[dotted] = value if isinstance(value, str) else json.dumps(value)
    return flat
