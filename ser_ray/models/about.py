"""What a model is, for those who use it: its emotions, how it was tested and how well, its licences, and what it is not
for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.corpora.describe import licence_of
from ser_ray.evaluation import calibration, card
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.models.pretrained import shown
from ser_ray.models.weights import read_object

NOTICE: Final = "People whose voice is analysed have to be told so."


def model_of(name: str, directory: Path) -> dict[str, Any]:
    """What a model says of itself to who uses it, on a server or a page: from the files of a checkpoint and of the
    results folder around it.

    Metrics of test, with intervals, are there where the checkpoint is ``best/`` of a results folder; else those of dev
    of its epoch. ``leaky`` is null where nothing says it.
    """
    experiment = config.load_experiment(directory / "experiment.yaml")
    tested = _evaluated(directory, "test")
    audited = _object(directory.parent / "audit.json") if tested else {}
    described = tested.get("protocol", {}).get("description")
    return {
        "name": name,
        "emotions": list(experiment.emotions),
        "backbone": shown(experiment.backbone),
        "adapter": experiment.adapter.method,
        "uses_voices": experiment.head.speaker != "none",
        "max_seconds": experiment.audio.max_seconds,
        "corpora": list(experiment.corpora),
        "protocol": described or experiment.protocol.scheme,
        "metrics": _metrics(directory, tested),
        "calibrated": (directory / calibration.FILE).is_file(),
        "leaky": bool(tested.get("leaky") or audited.get("leaky")) if tested else _leaky(experiment),
        "licences": licences(experiment),
        "not_for": card.limits(list(experiment.corpora)),
        "notice": NOTICE,
    }


def licences(experiment: Experiment) -> dict[str, str]:
    """Of the corpora that a model was trained on, as their modules say; that of the backbone is on its own page."""
    found = {corpus: licence_of(corpus) or "see where the corpus comes from" for corpus in experiment.corpora}
    return found | {shown(experiment.backbone): "see where the backbone comes from"}


# -- below: how it is done


def _metrics(directory: Path, tested: dict[str, Any]) -> dict[str, Any]:
    if tested:
        about = {"split": "test", "utterances": tested.get("n"), "unit": tested.get("ci95_unit")}
        return _headline(about, tested, tested.get("ci95") or {})
    epoch = read_object(directory / "metrics.json")
    return _headline({"split": "dev"}, {name.removeprefix("dev_"): value for name, value in epoch.items()}, {})


def _headline(about: dict[str, Any], values: dict[str, Any], intervals: dict[str, Any]) -> dict[str, Any]:
    found = {str(name): {"value": values[name], "ci95": intervals.get(name)} for name in HEADLINE if name in values}
    return about | found


def _leaky(experiment: Experiment) -> bool | None:
    return True if experiment.protocol.scheme == "random" else None


def _evaluated(directory: Path, split: str) -> dict[str, Any]:
    """The evaluation record of the results folder whose chosen checkpoint this is; empty for another checkpoint."""
    return _object(directory.parent / "evaluation" / f"{split}.json") if directory.name == "best" else {}


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
