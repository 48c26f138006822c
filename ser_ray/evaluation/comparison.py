"""Several searches side by side: what they differ in, what each reached at what cost, and which gaps are real."""

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
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.results import Results, as_number
from ser_ray.schema import Predictions


@dataclass(frozen=True)
class Gap:
    """Test figures of ``one`` less those of ``other`` on the same utterances, with paired 95 % intervals; or, with no
    figures, why there is no gap to speak of."""

    one: str
    other: str
    metrics: Mapping[str, Mapping[str, Any]]
    """Headline figure -> a record of `ser_ray.evaluation.gaps`."""
    no_gap_reason: str = ""


def labels(searches: Sequence[Results]) -> list[str]:
    """What each is called: its name, or where two have the same, its folder as far as it tells them apart."""
    names = [results.space.experiment.name for results in searches]
    if len(set(names)) == len(names):
        return names
    folders = [results.folder for results in searches]
    common = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(common)) for folder in folders]


def common_parent(folders: Sequence[Path]) -> Path:
    """The closest folder that holds all of them."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def differing(searches: Sequence[Results]) -> dict[str, list[str]]:
    """Dotted key of search.yaml -> its value in each search, for the keys in which they differ.

    What they are called is left out, and where their files lie.
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
    """What a search took: trials and seconds of them all, and what its winner costs."""
    seconds = [as_number(row.get("seconds")) for row in results.trials]
    winner = {
        key: as_number(results.leader.get(key))
        for key in ("seconds_per_epoch", "peak_memory_mb", "trainable_parameters")
    }
    return {"trials": float(len(results.trials)), "seconds": sum(s for s in seconds if s is not None)} | winner


def gaps(searches: Sequence[Results]) -> list[Gap]:
    """Every pair of searches, the first less the second; corrected for the number of pairs that are tested."""
    named = list(zip(labels(searches), searches, strict=True))
    found = [
        gap(one, other, first.predictions.get("test"), second.predictions.get("test"))
        for (one, first), (other, second) in itertools.combinations(named, 2)
    ]
    return [
        replace(pair, metrics=metrics)
        for pair, metrics in zip(found, corrected(pair.metrics for pair in found), strict=True)
    ]


def gap(one: str, other: str, first: Predictions | None, second: Predictions | None) -> Gap:
    """The paired gap of two searches on test, where both predicted the same utterances over the same emotions."""
    if first is None or second is None:
        return Gap(one, other, {}, f"{other if first is not None else one} has no test predictions yet")
    if first.emotions != second.emotions:
        return Gap(one, other, {}, "they tell other emotions apart")
    here, there = (np.argsort(np.asarray(p.utterance_ids), kind="stable") for p in (first, second))
    if [first.utterance_ids[i] for i in here] != [second.utterance_ids[i] for i in there]:
        return Gap(one, other, {}, "they were tested on other utterances")
    truth = first.labels[here]
    if not np.array_equal(truth, second.labels[there]):
        return Gap(one, other, {}, "the same utterances carry other labels")
    speakers = [first.speakers[i] for i in here]
    if len(set(speakers)) < 2:
        return Gap(one, other, {}, "one test speaker says nothing about others")
    said = first.predicted[here], second.predicted[there]
    return Gap(one, other, gap_records(truth, *said, speakers, len(first.emotions)))


# -- below: how it is done


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys; a mapping of one distribution, of conditions or of a tried point stays one value."""
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
