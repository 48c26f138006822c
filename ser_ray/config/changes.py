"""What may differ when a search is continued."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ser_ray.config.space import SearchSpace
from ser_ray.config.validation import to_dict

MAY_CHANGE = (
    "tune.trials",
    "tune.hours",
    "tune.gpu_hours",
    "tune.concurrency",
    "tune.log",
    "tune.ensemble",
    "resources.",
    "storage.prefix_gb",
    "experiment.epochs",
)
"""Keys that may change when a search is continued: they set its budget, resources and logs, not what a trial is. The
epochs may only grow (`refused`)."""


def differences(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The dotted keys in which two spaces differ, as ``key: old -> new``."""
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if _real(before.get(key)) != _real(after.get(key))
    ]


def refused(old: SearchSpace, new: SearchSpace) -> list[str]:
    """The `differences` that do not let ``new`` continue a search that was started as ``old``."""
    refusals = [change for change in differences(old, new) if not change.startswith(MAY_CHANGE)]
    if new.experiment.epochs < old.experiment.epochs:
        refusals.append(f"experiment.epochs: {old.experiment.epochs} -> {new.experiment.epochs}, which may only grow")
    return refusals


# -- below: how it is done


def _real(value: Any) -> Any:
    """A path as the links on it lead: the same place may be written in two ways."""
    return os.path.realpath(value) if isinstance(value, str) and value.startswith("/") else value


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
