"""The checkpoints that a server is called with, and the names by which clients ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ser_ray import config
from ser_ray.disk import expanded
from ser_ray.models import checkpoint
from ser_ray.schema import UserError


def named(checkpoints: Sequence[Path]) -> dict[str, str]:
    """Name -> directory of every checkpoint, in order: the name of its experiment, with the folders above where two
    have the same. Raises UserError for one that is none, or is given twice."""
    paths = [expanded(path).absolute() for path in checkpoints]
    if len(set(paths)) < len(paths):
        raise UserError("a checkpoint is given twice")
    for path in paths:
        checkpoint.check_is_one(path)
    names = [config.load_experiment(path / "experiment.yaml").name for path in paths]
    for path in paths:
        if not (path / "metrics.json").is_file():
            raise UserError(f"{path}: metrics.json is missing; give a complete checkpoint")
    return {
        name if names.count(name) == 1 else "/".join(path.parts[-3:]): str(path)
        for path, name in zip(paths, names, strict=True)
    }
