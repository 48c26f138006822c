"""The folder ``best/`` of a results folder: the chosen model, complete and with its card, to be given away."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ser_ray import config, disk
from ser_ray.evaluation import calibration, ensemble, layout
from ser_ray.evaluation.calibration import Calibration
from ser_ray.evaluation.card import model_card
from ser_ray.evaluation.ensemble import Chosen, Member

MEMBER: Final = "members/{:02}"
"""The directory of a member in that of its ensemble, by its number from 1."""


def install_best(
    directory: Path,
    chosen: Chosen,
    dev: Mapping[str, Any],
    test: Mapping[str, Any],
    metric: str,
    calibrated: Calibration,
) -> None:
    """Copy the chosen checkpoint to ``best/`` with its calibration and a model card, or all members of an ensemble;
    without the state to resume from, and without what links lead to: ``best/`` is there to be given away."""
    aside, best = directory / ".best.partial", directory / "best"
    shutil.rmtree(aside, ignore_errors=True)
    first = [(member, directory / member.candidate.runs[0].checkpoint) for member in chosen.members]
    if len(first) == 1:
        shutil.copytree(first[0][1], aside, ignore=_left_out)
    else:
        _install_members(first, aside, calibrated)
    measured = None
    if calibrated != Calibration():
        if len(first) == 1:
            disk.write_json(aside / calibration.FILE, calibrated.as_json())
        measured = disk.read_json(directory / "evaluation" / calibration.FILE)
    path = directory / "evaluation" / layout.ENSEMBLE
    combined = disk.read_json(path) if chosen.name == ensemble.NAME else None
    copied = aside if len(first) == 1 else aside / MEMBER.format(1)
    experiment = config.load_experiment(copied / "experiment.yaml")
    (aside / "README.md").write_text(model_card(experiment, dev, test, metric, measured, combined), "utf-8")
    shutil.rmtree(best, ignore_errors=True)
    aside.rename(best)


# -- below: how it is done


def _install_members(members: Sequence[tuple[Member, Path]], directory: Path, calibrated: Calibration) -> None:
    """Write an ensemble: every member with its own temperature, and the file that names them."""
    rows = []
    for number, (member, source) in enumerate(members, start=1):
        name = MEMBER.format(number)
        shutil.copytree(source, directory / name, ignore=_left_out)
        disk.write_json(directory / name / calibration.FILE, Calibration(member.candidate.temperature).as_json())
        rows.append({"directory": name, **member.as_json()})
    disk.write_json(directory / layout.ENSEMBLE, {"members": rows, **calibrated.as_json()})


def _left_out(folder: str, names: list[str]) -> set[str]:
    links = {name for name in names if (Path(folder) / name).is_symlink()}
    return links | shutil.ignore_patterns("training", ".*")(folder, names)
