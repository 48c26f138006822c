"""Read a results folder: what `tune`, `train` and `evaluate` left there, however far they came."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ser_ray.config import Adapter, SearchSpace, load, to_dict
from ser_ray.evaluation.summary import read_predictions
from ser_ray.schema import Predictions, UserError

THE_PROBE: Final = "the probe"
"""What a model is called whose best epoch is 0: `Head.init` probe, before anything of the backbone was trained."""
_LORA_ONLY: Final = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets")


@dataclass(frozen=True)
class Results:
    """What a results folder holds; whatever is not there yet is empty."""

    folder: Path
    space: SearchSpace
    provenance: dict[str, Any]
    audit: dict[str, Any]
    choice: dict[str, Any]
    dev: dict[str, Any]
    test: dict[str, Any]
    openings: list[dict[str, Any]]
    """One entry for every time that the test split was scored."""
    trials: list[dict[str, str]]
    """Rows of trials.csv, the best by the search's metric first."""
    histories: dict[str, list[dict[str, Any]]]
    """Trial -> its epochs in order."""
    predictions: dict[str, Predictions]
    """Split -> what the chosen trial said about it."""

    @property
    def metric(self) -> str:
        """The headline figure that trials are compared by: ``uar``."""
        return self.space.tune.metric.removeprefix("dev_")

    @property
    def leader(self) -> dict[str, str]:
        """The row of the chosen trial; before the choice, of the best one so far; without any figure, empty."""
        if chosen := self.choice.get("trial_id"):
            return next((row for row in self.trials if row["trial_id"] == chosen), {"trial_id": chosen})
        return next((row for row in self.trials if as_number(row.get(self.space.tune.metric)) is not None), {})

    @property
    def probe(self) -> str:
        """`the_probe` of the leader: of the runs that it is judged by, or of its one trial."""
        rows = [row for row in self.choice.get("finalists", ()) if row["trial_id"] == self.choice.get("trial_id")]
        runs = [run for row in rows for run in row.get("runs", ())] or self.runs
        checkpoints = [run["checkpoint"] for run in runs if run.get("checkpoint")]
        return the_probe(checkpoints or [self.leader.get("checkpoint", "")])

    @property
    def leaky(self) -> bool:
        """Whether anything here says that train and another split share speakers or recordings."""
        return any(part.get("leaky", False) for part in (self.audit, self.dev, self.test))

    @property
    def chosen_config(self) -> dict[str, Any]:
        """The leader's backbone, adapter and searched keys, dotted; of an adapter without LoRA no rank or the like, of
        the probe nothing of what was not trained."""
        return self.leaders_config(self.space.search)

    def leaders_config(self, searched: Iterable[str]) -> dict[str, Any]:
        """The same with other keys than those searched here, as a comparison with another search needs it."""
        keys = dict.fromkeys(["backbone", *(f"adapter.{name}" for name in Adapter.model_fields), *searched])
        base = to_dict(self.space.experiment)
        values: dict[str, Any] = {
            key: functools.reduce(lambda node, part: node[part], key.split("."), base) for key in keys
        }
        values |= {key: self.leader[key] for key in keys if key in self.space.search and self.leader.get(key)}
        without = _LORA_ONLY if values["adapter.method"] in ("frozen", "full") else ()
        untrained = ("adapter.", "optimizer.") if self.probe == THE_PROBE else ()
        return {
            key: value
            for key, value in values.items()
            if key not in without and not key.startswith(untrained) and value is not None
        }

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The figures of each fold and seed that was tested; empty where one checkpoint was."""
        return list(self.test.get("runs", ()))

    @property
    def answer(self) -> dict[str, Any]:
        """The test figures that count: the mean over the runs where there are several, else those of the one."""
        return self.test.get("mean") or self.test

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Row of the table of headline figures (test, dev, baselines) -> figures, as far as there are any."""
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
    """Read a results folder; UserError where it is none, or a file in it is broken."""
    if not (results_dir / "search.yaml").is_file():
        raise UserError(f"{results_dir}: no results folder (it holds no search.yaml); give results/<name>")
    space = load(results_dir / "search.yaml")
    evaluation = results_dir / "evaluation"
    predictions = evaluation / "predictions.parquet"
    histories = sorted(results_dir.glob("trials/*/history.jsonl"))
    return Results(
        folder=results_dir.resolve(),
        space=space,
        provenance=_read_json(results_dir / "provenance.json", {}),
        audit=_read_json(results_dir / "audit.json", {}),
        choice=_read_json(evaluation / "choice.json", {}),
        dev=_read_json(evaluation / "dev.json", {}),
        test=_read_json(evaluation / "test.json", {}),
        openings=_read_json(evaluation / "test_openings.json", []),
        trials=_read_trials(results_dir / "trials.csv", space.tune.metric),
        histories={path.parent.name: read_history(path) for path in histories},
        predictions=read_predictions(predictions) if predictions.is_file() else {},
    )


def the_probe(checkpoints: Sequence[str]) -> str:
    """``the probe`` where all checkpoints are of epoch 0, in how many runs where some are, else nothing.

    >>> the_probe(["trials/001/epoch_000"]), the_probe(["a/epoch_000", "b/epoch_004"]), the_probe(["b/epoch_010"])
    ('the probe', 'the probe in 1 of 2 runs', '')
    """
    untrained = sum(Path(checkpoint).name == "epoch_000" for checkpoint in checkpoints)
    some = f"{THE_PROBE} in {untrained} of {len(checkpoints)} runs" if untrained else ""
    return THE_PROBE if untrained and untrained == len(checkpoints) else some


def read_history(path: Path) -> list[dict[str, Any]]:
    """The epochs of a history.jsonl in order; of an epoch that a resumed trial repeats, the last line counts.

    Raises UserError where a line is no epoch. A last line that was cut off by a kill is left out.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if lines and not text.endswith("\n") and not lines[-1].endswith("}"):
        lines.pop()
    try:
        epochs = {record["epoch"]: record for record in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is no epoch ({error}); remove it") from None
    return [epochs[epoch] for epoch in sorted(epochs)]


def as_number(value: object) -> float | None:
    """The finite number that a cell of a table holds, or None for a word, nothing, true or NaN.

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
        raise UserError(f"{path}: has no column trial_id; it is not what ser-ray tune wrote")

    def by_metric(row: dict[str, str]) -> float:
        figure = as_number(row.get(metric))
        return -math.inf if figure is None else figure

    return sorted(rows, key=by_metric, reverse=True)
