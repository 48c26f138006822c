"""Read a results folder that `tune`, `train` and `evaluate` wrote, finished or not."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ser_ray.config import Adapter, SearchSpace, load, to_dict
from ser_ray.disk import resolved
from ser_ray.evaluation import calibration, enrolment
from ser_ray.evaluation.exports import Export, read_exports
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.summary import read_predictions
from ser_ray.schema import UserError

THE_PROBE: Final = "the probe"
"""The name of a model whose best epoch is 0: `Head.init` probe, before any training of the backbone."""
TEACHER: Final = "evaluation/teacher.json"
"""The record of `evaluation.student`."""
JOIN: Final = " + "
"""Between the checkpoints of an ensemble, where a single model has one."""
_LORA_ONLY: Final = tuple(f"adapter.{name}" for name in Adapter.model_fields if name not in ("method", "first_layer"))
_OF_LORAPLUS: Final = ("adapter.loraplus_ratio",)


@dataclass(frozen=True)
class Results:
    """The content of a results folder; what is not there yet is empty."""

    folder: Path
    space: SearchSpace
    provenance: dict[str, Any]
    audit: dict[str, Any]
    choice: dict[str, Any]
    dev: dict[str, Any]
    test: dict[str, Any]
    enrolment: dict[str, Any]
    """What recordings of a speaker without labels are worth: a curve for dev and test; see `evaluation.enrolment`."""
    calibration: dict[str, Any]
    """Its temperature and its sets, on dev and test; see `evaluation.calibration.record_of`."""
    ensemble: dict[str, Any]
    """With ``tune.ensemble``: how it was chosen, and whether it is used; see `evaluation.ensemble`."""
    exports: list[Export]
    """Of ``best/``, by `ser-ray export`."""
    openings: list[dict[str, Any]]
    """One entry for every opening of the test set."""
    trials: list[dict[str, str]]
    """Rows of trials.csv, best first by the search's metric."""
    histories: dict[str, list[dict[str, Any]]]
    """Trial -> its epochs in order."""
    predictions: dict[str, Predictions]
    """Split -> the predictions of the chosen trial."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """Of a student of ``ser-ray distil``: the gap to its teacher, and what both cost; see `evaluation.student`."""

    @property
    def metric(self) -> str:
        """The headline metric that trials are compared by, such as ``uar``."""
        return self.space.tune.metric.removeprefix("dev_")

    @property
    def leader(self) -> dict[str, str]:
        """The row of the chosen trial; before the choice, of the best one so far; empty if no trial has the metric."""
        if chosen := self.choice.get("trial_id"):
            return next((row for row in self.trials if row["trial_id"] == chosen), {"trial_id": chosen})
        return next((row for row in self.trials if as_number(row.get(self.space.tune.metric)) is not None), {})

    @property
    def probe(self) -> str:
        """`the_probe` of the leader: over the runs that it is compared by, or of its one trial."""
        rows = [row for row in self.choice.get("finalists", ()) if row["trial_id"] == self.choice.get("trial_id")]
        runs = [run for row in rows for run in row.get("runs", ())] or self.runs
        checkpoints = [run["checkpoint"] for run in runs if run.get("checkpoint")]
        return the_probe(checkpoints or [self.leader.get("checkpoint", "")])

    @property
    def leaky(self) -> bool:
        """Whether the audit, dev or test record says that train shares speakers or recordings with another split."""
        return any(part.get("leaky", False) for part in (self.audit, self.dev, self.test))

    @property
    def chosen_config(self) -> dict[str, Any]:
        """The leader's backbone, adapter and searched keys, dotted; without LoRA no LoRA keys, for the probe no keys of
        the adapter or the optimizer."""
        return self.leaders_config(self.space.search)

    def leaders_config(self, searched: Iterable[str]) -> dict[str, Any]:
        """The same for the keys in ``searched``, which may be those of another search to compare with."""
        keys = dict.fromkeys(["backbone", *(f"adapter.{name}" for name in Adapter.model_fields), *searched])
        base = to_dict(self.space.experiment)
        values: dict[str, Any] = {
            key: functools.reduce(lambda node, part: node[part], key.split("."), base) for key in keys
        }
        values |= {key: self.leader[key] for key in keys if key in self.space.search and self.leader.get(key)}
        without: tuple[str, ...] = () if values["adapter.variant"] == "loraplus" else _OF_LORAPLUS
        if values["adapter.method"] in ("frozen", "full"):
            without = _LORA_ONLY
        untrained = ("adapter.", "optimizer.") if self.probe == THE_PROBE else ()
        return {
            key: value
            for key, value in values.items()
            if key not in without and not key.startswith(untrained) and value is not None
        }

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The test metrics of each run, a fold and a seed; empty without a test record."""
        return list(self.test.get("runs", ()))

    @property
    def answer(self) -> dict[str, Any]:
        """The test metrics to report: the mean over the runs if there are several, else those of the only run."""
        return self.test.get("mean") or self.test

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Row of the table of headline metrics (test, dev, baselines) -> its metrics; rows without any are left out."""
        rows = {"test": self.test}
        if "mean" in self.test:
            rows = {f"test, mean of {len(self.runs)} runs": self.answer, "test, runs pooled": self.test}
        if averaged := self.test.get("seeds_averaged"):
            several = len({run["fold"] for run in self.runs}) > 1
            rows |= {"test, seeds averaged, mean of folds": averaged["mean"]} if several else {}
            rows |= {"the same, folds pooled" if several else "test, seeds averaged": averaged}
        rows |= {"dev": self.dev, **(self.test or self.dev).get("baselines", {})}
        return {name: metrics for name, metrics in rows.items() if metrics}


def read_results(results_dir: Path) -> Results:
    """Read a results folder. Raises UserError if it is not one, or a file in it is broken."""
    if not (results_dir / "search.yaml").is_file():
        raise UserError(f"{results_dir}: not a results folder (it holds no search.yaml); give results/<name>")
    space = load(results_dir / "search.yaml")
    evaluation = results_dir / "evaluation"
    predictions = evaluation / "predictions.parquet"
    histories = sorted(results_dir.glob("trials/*/history.jsonl"))
    return Results(
        folder=resolved(results_dir),
        space=space,
        provenance=_read_json(results_dir / "provenance.json", {}),
        audit=_read_json(results_dir / "audit.json", {}),
        choice=_read_json(evaluation / "choice.json", {}),
        dev=_read_json(evaluation / "dev.json", {}),
        test=_read_json(evaluation / "test.json", {}),
        enrolment=_read_json(evaluation / enrolment.FILE, {}),
        calibration=_read_json(evaluation / calibration.FILE, {}),
        ensemble=_read_json(evaluation / ENSEMBLE, {}),
        exports=read_exports(results_dir),
        openings=_read_json(evaluation / "test_openings.json", []),
        trials=_read_trials(results_dir / "trials.csv", space.tune.metric),
        histories={path.parent.name: read_history(path) for path in histories},
        predictions=read_predictions(predictions) if predictions.is_file() else {},
        teacher=_read_json(results_dir / TEACHER, {}),
    )


def the_probe(checkpoints: Sequence[str]) -> str:
    """``the probe`` if all checkpoints are of epoch 0; with the number of runs if some are; else empty.

    >>> the_probe(["trials/001/epoch_000"]), the_probe(["a/epoch_000", "b/epoch_004"]), the_probe(["b/epoch_010"])
    ('the probe', 'the probe in 1 of 2 runs', '')
    """
    untrained = sum(all(Path(p).name == "epoch_000" for p in checkpoint.split(JOIN)) for checkpoint in checkpoints)
    some = f"{THE_PROBE} in {untrained} of {len(checkpoints)} runs" if untrained else ""
    return THE_PROBE if untrained and untrained == len(checkpoints) else some


def read_history(path: Path) -> list[dict[str, Any]]:
    """The epochs of a history.jsonl in order; if a resumed trial repeats an epoch, its last line counts.

    Raises UserError if a line is not an epoch. A last line that was cut off by a kill is left out.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not lines[-1].endswith("}"):
        lines.pop()
    try:
        epochs = {record["epoch"]: record for record in map(json.loads, lines)}
        if not all(isinstance(epoch, int) for epoch in epochs):
            raise TypeError("its number is no integer")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is not an epoch ({error}); remove it") from None
    return [epochs[epoch] for epoch in sorted(epochs)]


def as_number(value: object) -> float | None:
    """The finite number in a cell of a table; None for text, an empty cell, a bool, NaN or infinity.

    >>> as_number("3e-4"), as_number(2), as_number("openai/whisper-base"), as_number(""), as_number("nan")
    (0.0003, 2.0, None, None, None)
    """
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# -- below: how it is done


def _read_json(path: Path, absent: Any) -> Any:
    if not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run the command that writes it again") from None


def _read_trials(path: Path, metric: str) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if any("trial_id" not in row for row in rows):
        raise UserError(f"{path}: has no column trial_id; it was not written by ser-ray")

    def by_metric(row: dict[str, str]) -> float:
        value = as_number(row.get(metric))
        return -math.inf if value is None else value

    return sorted(rows, key=by_metric, reverse=True)
