"""Write a results folder, atomically; `ser_ray.evaluation.results` reads it.

search.yaml  provenance.json  audit.json  trials.csv  trials/<id>/{history.jsonl, epoch_NNN/}
best/  evaluation/{dev,test,choice,test_openings}.json  evaluation/predictions.parquet  report.html
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ser_ray.disk import write_text
from ser_ray.evaluation.results import read_history

Record = dict[str, Any]
NOTES = "notes.txt"
"""In a trial's folder: lines for people on what it does before its first epoch."""
DEV_FIGURES = ("dev_uar", "dev_accuracy", "dev_macro_f1", "dev_kappa")


def append_history(trial_dir: Path, record: Record) -> None:
    """Add an epoch's line to a trial's history; a line that a kill cut short is dropped first."""
    trial_dir.mkdir(parents=True, exist_ok=True)
    with (trial_dir / "history.jsonl").open("a+b") as file:
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0] + whole[1]))
        file.write(json.dumps(record).encode() + b"\n")


def trial_history(trial_dir: Path) -> list[Record]:
    """A trial's epochs so far, in order."""
    path = trial_dir / "history.jsonl"
    return read_history(path) if path.is_file() else []


def checkpoint_name(epoch: int) -> str:
    """The folder of an epoch's checkpoint inside its trial's."""
    return f"epoch_{epoch:03d}"


def trial_row(results_dir: Path, trial_id: str, status: str, values: Mapping[str, Any], seconds: float) -> Record:
    """One row of ``trials.csv``, with the figures of the trial's best epoch so far."""
    history = trial_history(results_dir / "trials" / trial_id)
    best = next((r for r in history if r["epoch"] == history[-1]["best_epoch"]), {}) if history else {}
    checkpoint = f"trials/{trial_id}/{checkpoint_name(best['epoch'])}" if best else ""
    return (
        {"trial_id": trial_id, "status": status, "epochs": history[-1]["epoch"] if history else 0}
        | {"seconds": round(seconds, 1)}
        | dict(values)
        | {"best_epoch": best.get("epoch", "")}
        | {name: best.get(name, "") for name in DEV_FIGURES}
        | {"peak_memory_mb": max((r["peak_memory_mb"] for r in history), default="")}
        | {"trainable_parameters": best.get("trainable_parameters", ""), "checkpoint": checkpoint}
    )


def write_trials(results_dir: Path, rows: Iterable[Record]) -> None:
    """Write ``trials.csv``, one row a trial."""
    rows = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(results_dir / "trials.csv", buffer.getvalue())


def read_trials(results_dir: Path) -> list[dict[str, str]]:
    """The rows of ``trials.csv`` as they were written, every value as text."""
    with (results_dir / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
