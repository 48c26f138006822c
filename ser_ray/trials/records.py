"""The trials of a search while it runs: read from disk, held in memory, and written back at every change."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ser_ray import disk
from ser_ray.config import Experiment
from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord

ATTEMPTS: Final = 4
"""A trial whose processes keep dying is given up after this many attempts without an epoch between them, whatever the
cause and in whatever session. A machine that fails now and then costs an epoch each time; one that always fails must
not block the search forever."""


class Trials:
    """The trials below ``results_dir/kind``; ``keys`` are the columns of ``trials.csv`` for the searched values."""

    def __init__(self, results_dir: Path, keys: Iterable[str], kind: str = "trials", argv: Iterable[str] = ()) -> None:
        self.results_dir, self.keys, self.kind = results_dir, list(keys), kind
        self.known = {record.trial_id: record for record in folder.read_trials(results_dir / kind)}
        self.before = {trial_id: record.seconds for trial_id, record in self.known.items()}
        self.begun: set[str] = set()
        """Ids of trials with an attempt that has not ended yet."""
        self.error: Exception | None = None
        """Why nothing can be written any more. Tune, which calls this class, turns an exception into a traceback or
        ignores it."""
        self.started = time.monotonic()
        self.session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "argv": list(argv)}

    def __iter__(self) -> Any:
        """In order of their ids."""
        return iter(sorted(self.known.values(), key=lambda record: record.trial_id))

    def add(self, trial_id: str, values: Mapping[str, Any]) -> TrialRecord:
        """Add a trial that is to be started."""
        self.known[trial_id] = TrialRecord(trial_id, values)
        return self.update(trial_id)

    def resume(
        self, experiment_of: Callable[[Mapping[str, Any]], Experiment], wanted: Container[str] | None = None
    ) -> None:
        """Decide at the start of a session which trials (of those that are ``wanted``) run again. ``experiment_of``: a
        trial's values -> its experiment.

        Failed trials are tried again, as the cause may be gone. Trials that ended with their last epoch continue if the
        experiment has more epochs now. Trials that died with their session too often are given up.
        """
        for record in [known for known in self if wanted is None or known.trial_id in wanted]:
            if record.status == "failed" or record.may_grow(experiment_of(record.values)):
                self.update(record.trial_id, status="running", error="", attempts=0)
            elif not record.over and self._spent(record):
                reason = record.error or "its process died, and the search with it"
                self.update(record.trial_id, status="failed", error=f"{reason} ({record.attempts} times)")

    def begin(self, trial_id: str) -> TrialRecord:
        """Count an attempt, before its processes start: one that dies at once, or ends this process too, is counted."""
        record = self.known[trial_id]
        attempts = 1 if record.reached != len(record.history) else record.attempts + 1
        self.begun.add(trial_id)
        self.before[trial_id] = record.seconds  # Tune reports the seconds of an attempt
        return self.update(trial_id, attempts=attempts, reached=len(record.history))

    def release(self) -> None:
        """The session was ended on purpose: the attempts that this interrupted do not count."""
        for trial_id in sorted(self.begun):
            self.update(trial_id, attempts=self.known[trial_id].attempts - 1)
        self.begun.clear()

    def start(self, trial_id: str) -> TrialRecord:
        """Its process runs: the trial starts, or continues."""
        return self.update(trial_id, status="running", error="")

    def update(self, trial_id: str, seconds: float | None = None, **changes: Any) -> TrialRecord:
        """Write what changed of a trial: status, error, ``seconds`` of this attempt; its history is read again."""
        if seconds is not None:
            changes["seconds"] = self.before.get(trial_id, 0.0) + seconds
        directory = self.results_dir / self.kind
        history = tuple(folder.trial_history(directory / trial_id))
        record = dataclasses.replace(self.known[trial_id], history=history, **changes)
        self.known[trial_id] = record
        if record.over:
            self.begun.discard(trial_id)
        try:
            folder.write_trial(directory, record)
            if self.kind == "trials":
                folder.write_trials(self.results_dir, [folder.trial_row(known, self.keys) for known in self])
            self._write_session()
        except OSError as error:
            self.error = error
            raise
        return record

    def interrupted(self, trial_id: str, reason: str) -> TrialRecord:
        """A trial's process died: it continues from its last epoch, unless that has happened too often."""
        self.begun.discard(trial_id)
        record = self.update(trial_id, status="running", error=reason)
        if not self._spent(record):
            return record
        return self.update(trial_id, status="failed", error=f"{reason} ({record.attempts} times)")

    def short_of_memory(self, trial_id: str, reason: str) -> TrialRecord:
        """A trial ran out of memory: it continues from its last epoch with half of the batch, once."""
        self.begun.discard(trial_id)
        if self.known[trial_id].halved:
            return self.update(trial_id, status="failed", error=f"{reason} (half of batch_seconds was tried)")
        return self.update(trial_id, status="running", error=reason, halved=True, attempts=0)

    def hours(self) -> float:
        """Total hours of all sessions of this search."""
        sessions = [*_earlier_sessions(self.results_dir, self.session["started"]), {"seconds": self._own_seconds()}]
        return sum(float(session["seconds"]) for session in sessions) / 3600

    def _spent(self, record: TrialRecord) -> bool:
        return record.attempts >= ATTEMPTS and record.reached == len(record.history)

    def _own_seconds(self) -> float:
        return time.monotonic() - self.started

    def _write_session(self) -> None:
        earlier = _earlier_sessions(self.results_dir, self.session["started"])
        own = self.session | {"seconds": round(self._own_seconds(), 1)}
        disk.write_json(self.results_dir / "sessions.json", [*earlier, own])


def _earlier_sessions(results_dir: Path, own: object) -> list[dict[str, Any]]:
    path = results_dir / "sessions.json"
    sessions: list[dict[str, Any]] = disk.read_json(path) if path.is_file() else []
    return [session for session in sessions if session["started"] != own]
