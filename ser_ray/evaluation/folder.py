"""Write a results folder, atomically; `ser_ray.evaluation.results` reads it.

search.yaml  provenance.json  audit.json  trials.csv  trials/<id>/{trial.json, history.jsonl, epoch_NNN/}
finals/<id>-foldF-seedS/  best/  evaluation/{dev,test,choice,test_openings}.json  evaluation/predictions.parquet
report.html

A trial's own folder is the authoritative record of it; ``trials.csv`` is rebuilt from all of them.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ser_ray.config import Experiment
from ser_ray.disk import locked, read_json, write_json, write_text
from ser_ray.evaluation.results import read_history
from ser_ray.schema import UserError, reason_of

Record = dict[str, Any]
NOTES = "notes.txt"
"""In a trial's folder: human-readable lines on what it does before its first epoch."""
COSTS = ("seconds_per_epoch", "peak_memory_mb", "trainable_parameters")
DEV_METRICS = ("dev_uar", "dev_accuracy", "dev_macro_f1", "dev_kappa")


@dataclass(frozen=True)
class TrialRecord:
    """A trial, as recorded in its folder."""

    trial_id: str
    values: Mapping[str, Any]
    """Searched key -> value."""
    status: str = "running"
    """running (also if it was interrupted), finished, stopped (by the scheduler), failed."""
    error: str = ""
    seconds: float = 0.0
    """Total of all sessions that worked on it."""
    attempts: int = 0
    """How often it was started since its last epoch, in all sessions."""
    reached: int = 0
    """The number of epochs in its history at its last start."""
    halved: bool = False
    """Whether it ran out of memory once: its batches are then half as large, and a step accumulates twice as many."""
    history: Sequence[Record] = field(default=(), repr=False)

    @property
    def over(self) -> bool:
        """Whether it has ended: finished, stopped or failed."""
        return self.status in ("finished", "stopped", "failed")

    @property
    def best(self) -> Record:
        """The record of its best epoch; empty before the first."""
        return next((r for r in self.history if r["epoch"] == self.history[-1]["best_epoch"]), {})

    def may_grow(self, experiment: Experiment) -> bool:
        """Whether it ran all its epochs and ``experiment`` has more of them; False if patience or the scheduler ended
        it."""
        if self.status != "finished" or not self.history:
            return False
        following, best = self.history[-1]["epoch"] + 1, self.history[-1]["best_epoch"]
        return bool(following <= experiment.epochs and following - best <= experiment.patience)


@contextmanager
def alone(results_dir: Path) -> Iterator[None]:
    """Lock a results folder: for every command that trains, chooses or tests.

    On a file system without locks, two processes are not kept apart. Raises UserError if another process works on the
    folder, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            got = stack.enter_context(locked(results_dir / ".lock", wait=False))
        except OSError as error:
            raise UserError(f"storage.results: cannot write to {results_dir}: {error.strerror}") from None
        if got is False:
            raise UserError(f"{results_dir}: another process works on this; wait for it, or set experiment.name")
        yield


def write_trial(trials_dir: Path, record: TrialRecord) -> None:
    """Write a trial's ``trial.json``."""
    known = {one.name: getattr(record, one.name) for one in fields(record) if one.name != "history"}
    write_json(trials_dir / record.trial_id / "trial.json", known | {"values": dict(record.values)})


def read_trials(trials_dir: Path) -> list[TrialRecord]:
    """All trials of a folder, in order of their ids. Raises UserError for a record that is damaged, or names another
    trial than its folder: what is written about a trial goes to the folder of that name."""
    return [_read_trial(path) for path in sorted(trials_dir.glob("*/trial.json"))]


def costs(history: Sequence[Record]) -> dict[str, float]:
    """What a trial costs: seconds_per_epoch (the median), peak_memory_mb, trainable_parameters."""
    epochs = [record["seconds"] for record in history if record["epoch"] > 0]
    return {
        "seconds_per_epoch": round(statistics.median(epochs), 3) if epochs else 0.0,
        "peak_memory_mb": max(record["peak_memory_mb"] for record in history),
        "trainable_parameters": history[-1]["trainable_parameters"],
    }


def describe_epoch(record: Mapping[str, Any], metric: str = "dev_uar") -> str:
    """One epoch as a human-readable line."""
    loss = "   probe" if record["train_loss"] is None else f"{record['train_loss']:8.3f}"
    return (
        f"epoch {record['epoch']:2d}  train loss {loss}  dev UAR {record['dev_uar']:.3f}  "
        f"best {record[f'best_{metric}']:.3f}  {record['seconds']:5.1f} s"
    )


def append_history(trial_dir: Path, record: Record) -> None:
    """Append an epoch's line to a trial's history; first drop a last line that a kill cut short."""
    trial_dir.mkdir(parents=True, exist_ok=True)
    with (trial_dir / "history.jsonl").open("a+b") as file:
        file.seek(0)
        complete = file.read().rpartition(b"\n")
        file.truncate(len(complete[0] + complete[1]))
        file.write(json.dumps(record).encode() + b"\n")


def trial_history(trial_dir: Path) -> list[Record]:
    """A trial's epochs so far, in order."""
    path = trial_dir / "history.jsonl"
    return read_history(path) if path.is_file() else []


def checkpoint_name(epoch: int) -> str:
    """The folder of an epoch's checkpoint inside the trial's folder."""
    return f"epoch_{epoch:03d}"


def trial_row(record: TrialRecord, keys: Iterable[str] = ()) -> Record:
    """One row of ``trials.csv``: the searched ``keys``, and the metrics of the trial's best epoch so far."""
    best, history = record.best, record.history
    cost = costs(history) if history else dict.fromkeys(COSTS, "")
    return (
        {"trial_id": record.trial_id, "status": record.status, "epochs": history[-1]["epoch"] if history else 0}
        | {"seconds": round(record.seconds, 1)}
        | {key: record.values.get(key, "") for key in keys}
        | {"best_epoch": best.get("epoch", "")}
        | {name: best.get(name, "") for name in DEV_METRICS}
        | cost
        | {"checkpoint": f"trials/{record.trial_id}/{checkpoint_name(best['epoch'])}" if best else ""}
        | {"halved": "batch_seconds" if record.halved else "", "error": record.error}
    )


def write_trials(results_dir: Path, rows: Iterable[Record]) -> None:
    """Write ``trials.csv``, one row per trial."""
    rows = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(results_dir / "trials.csv", buffer.getvalue())


def read_trial_rows(results_dir: Path) -> list[dict[str, str]]:
    """The rows of ``trials.csv`` as they were written, every value as text."""
    with (results_dir / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- below: how it is done


def _read_trial(path: Path) -> TrialRecord:
    try:
        record = TrialRecord(**read_json(path), history=tuple(trial_history(path.parent)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a trial ({reason_of(error, 120)})") from None
    if record.trial_id != path.parent.name:
        raise UserError(f"{path}: its trial_id is {str(record.trial_id)[:80]!r}; it has to be that of its folder")
    return record
