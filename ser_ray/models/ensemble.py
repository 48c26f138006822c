"""A model of several: checkpoints that answer together, by the product of their calibrated probabilities.

ensemble.json      the members' directories, weights and temperatures; the temperature of the product, and its sets
members/01, 02...  the members, each a complete checkpoint

How they are chosen is in `ser_ray.evaluation.ensemble`. `load` reads a directory of either kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ser_ray.config import Experiment
from ser_ray.disk import expanded
from ser_ray.evaluation.ensemble import product
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.weights import read_object
from ser_ray.schema import UserError

MOST: Final = 100
"""Members of a stranger's ensemble."""


@dataclass(frozen=True)
class Ensemble:
    """Members of the same emotions and the same audio settings."""

    members: tuple[EmotionClassifier, ...]
    weights: tuple[float, ...]
    """Their sum is 1."""
    temperature: float
    """Of the product; each member has its own besides."""
    least_probability: float | None
    """Of an emotion in a set; see `EmotionClassifier.least_probability`."""

    @property
    def experiment(self) -> Experiment:
        """That of the first member: its emotions and audio settings are those of all."""
        return self.members[0].experiment


Model = EmotionClassifier | Ensemble


def load(
    directory: str | Path,
    device: torch.device | str = "cpu",
    backbone: str | Path | None = None,
    precision: str | None = None,
) -> Model:
    """The model in a directory: of a checkpoint, as `checkpoint.load`, or of an ensemble, with all of its members.

    ``backbone``: where the backbone is now; for an ensemble, that of all members. Raises UserError as
    `checkpoint.load`, and for an ensemble.json that does not fit its members.
    """
    return assembled(directory, lambda one: checkpoint.load(one, device, backbone, precision))


def assembled(directory: str | Path, load_one: Callable[[Path], EmotionClassifier]) -> Model:
    """The same, of the models that ``load_one`` makes of the directory of each checkpoint."""
    directory = expanded(directory).absolute()
    path = directory / ENSEMBLE
    if not path.is_file():
        return load_one(directory)
    content = read_object(path)
    names, weights = _members(content, path)
    known = checkpoint.calibration_in(content, path)
    members = tuple(load_one(directory / name) for name in names)
    for name, member in zip(names, members, strict=True):
        first, own = members[0].experiment, member.experiment
        if (own.emotions, own.audio) != (first.emotions, first.audio):
            raise UserError(f"{directory / name}: its emotions or its audio settings are not those of {names[0]}")
    return Ensemble(members, weights, known.temperature, known.least_probability)


def members_of(model: Model) -> tuple[EmotionClassifier, ...]:
    """The models that answer: one, or several."""
    return model.members if isinstance(model, Ensemble) else (model,)


def uses_voices(model: Model) -> bool:
    """Whether it makes something of what is known of a speaker."""
    return any(member.head.speaker is not None for member in members_of(model))


def widths_of(model: Model) -> list[int]:
    """The width of the pooled vector of each member, which is that of its part of a voice."""
    return [member.head.embedding_width for member in members_of(model)]


def together(model: Model, probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """(N, K) of a model, from those of its `members_of`; NaN where one of them is."""
    if not isinstance(model, Ensemble):
        return probabilities[0]
    return product(probabilities, model.weights, model.temperature)


# -- below: how it is done


def _members(content: dict[str, Any], path: Path) -> tuple[list[str], tuple[float, ...]]:
    """The members' directories inside the ensemble's own, and their weights."""
    rows = content.get("members")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: members has to be a list of 1 to {MOST} models")
    names, weights = [row.get("directory") for row in rows], [row.get("weight") for row in rows]
    if bad := [name for name in names if not isinstance(name, str) or not re.fullmatch(r"members/\d{2,3}", name)]:
        raise UserError(f"{path}: {str(bad[0])[:80]!r} is no member's directory, such as members/01")
    if not all(isinstance(w, int | float) and not isinstance(w, bool) and 0 < w <= 1 for w in weights):
        raise UserError(f"{path}: a member's weight is a number above 0, at most 1")
    total = sum(weights)
    return names, tuple(weight / total for weight in weights)
