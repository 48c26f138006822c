"""The console output of a running search: a live table in a terminal, the same as lines in a job's log."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ray import tune
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.runtime import cluster, failures
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.contact import Contact
from ser_ray.schema import MemoryShortageError, ProcessDiedError, StorageError, UserError
from ser_ray.terminal import titled
from ser_ray.trials.logs import open_logs
from ser_ray.trials.records import Trials

HEARTBEAT_S: Final = 20.0
"""A log gets a line at least this often, as an epoch of a large backbone takes minutes."""
_EXCEPTION: Final = re.compile(r"((\w+\.)+[A-Z]\w*|[A-Z]\w*(Error|Exception|Exit|Interrupt))(: .*)?")
"""The last line of a traceback: the name of an exception, and its message."""
ROWS: Final = 12
"""Trials in the live table: the running ones, then the best."""


class Watch(tune.Callback):
    """Passes Tune's events on: to `Trials`, which writes them down, to the logs, and to the console."""

    def __init__(self, space: SearchSpace, trials: Trials, allocation: Allocation, console: Console) -> None:
        self.space, self.trials, self.allocation, self.console = space, trials, allocation, console
        self.logs = open_logs(space, trials.results_dir)
        self.live: Live | None = None
        self.last_line = self.started = time.monotonic()
        self.noted: dict[str, int] = {}
        self.running: dict[str, float] = {}
        self.silent: set[str] = set()
        """Of the running trials those that have told nothing since they started: their workers may wait for room."""
        self.waiting = 0
        """How many trials wait for room for their workers."""
        self.next_look = 0.0
        self.contact = Contact()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks with its state, which is never read; a terminal cannot be pickled."""
        return self.__dict__ | {"console": None, "live": None, "logs": [], "contact": None}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """In a terminal, show the table while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True) as self.live:
            yield
        self.live = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that a trial starts or continues, and its values."""
        trial_id, values = trial.config["trial_id"], trial.config["values"]
        record = self.trials.start(trial_id)
        self.running[trial_id] = time.monotonic()
        self.silent.add(trial_id)
        how = f"continues after epoch {record.history[-1]['epoch']}: " if record.history else "starts: "
        self._say(trial_id, how + ", ".join(f"{key}={short(value)}" for key, value in values.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log and print the metrics of an epoch."""
        trial_id = trial.config["trial_id"]
        self.silent.discard(trial_id)
        record = self.trials.update(trial_id, result.get("time_total_s"))
        for log in self.logs:
            log(trial_id, record.values, record.history[-1])
        self._say(trial_id, folder.describe_epoch(result, self.space.tune.metric))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print how a trial ended: by itself, or stopped by the scheduler."""
        trial_id, last = trial.config["trial_id"], trial.last_result or {}
        self._ends(trial_id)
        status = "finished" if last.get("last", False) else "stopped"
        self.trials.update(trial_id, last.get("time_total_s"), status=status)
        how = "finished" if status == "finished" else "stopped by the scheduler"
        self._say(trial_id, how + self._so_far())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print why a trial failed; a trial whose processes died continues."""
        trial_id, reason = trial.config["trial_id"], _reason(Path(trial.error_file))
        self._ends(trial_id)
        kind, _, message = reason.partition(": ")
        if kind == _name(StorageError):  # every other trial would fail too; the next command continues them
            self.trials.error = StorageError(message)
            raise self.trials.error
        if kind == _name(UserError):
            record, what = self.trials.update(trial_id, status="failed", error=message), ""
        elif kind == _name(MemoryShortageError):
            record, what = self.trials.short_of_memory(trial_id, message), "is retried with half of batch_seconds"
        else:
            message = message if kind == _name(ProcessDiedError) else reason
            record = self.trials.interrupted(trial_id, message)
            what = "was interrupted and continues from its last epoch"
        self._say(trial_id, f"failed: {record.error}" if record.over else f"{what}: {message}", always=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Print the notes of trials before their first epoch, and a heartbeat during long epochs.

        Raises LostMessageError where nothing would ever happen any more.
        """
        self.contact.check()
        for trial_id in self.running:
            self._pass_on_notes(trial_id)
        now = time.monotonic()
        if self.allocation.workers > 1 and now > self.next_look:
            self.waiting = cluster.trainers_waiting(self.allocation.workers)
            self.next_look = now + cluster.LOOK_S
        if not self.live and now - self.last_line > HEARTBEAT_S:
            self.console.print(f"  ... {self._doing()}", style="dim")
            self.last_line = now

    def table(self) -> Table:
        """The running trials, and the best of the others."""
        metric = self.space.tune.metric
        over = sum(trial.over for trial in self.trials)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
        table.title = f"{over} of {self._total()} trials done{self._eta()}"
        for name in ("trial", "", "epoch", metric.replace("_", " "), *self.space.search, "time"):
            table.add_column(name, overflow="fold")
        order = sorted(self.trials, key=lambda t: (t.trial_id not in self.running, -t.best.get(metric, -1.0)))
        for trial in order[:ROWS]:
            started = self.running.get(trial.trial_id)
            seconds = trial.seconds if started is None else time.monotonic() - started
            runs = started is not None and trial.trial_id not in self._held_up()
            status = "running" if runs else ("waiting" if not trial.over else trial.status)
            best = f"{trial.best[metric]:.3f}" if trial.best else ""
            values = [short(trial.values[key]) if key in trial.values else "" for key in self.space.search]
            style = "bold" if started is not None else "dim" if status == "failed" else None
            minutes = f"{seconds / 60:.1f} min"
            table.add_row(
                trial.trial_id, status, str(self._epochs(trial.trial_id)), best, *values, minutes, style=style
            )
        return table

    def _ends(self, trial_id: str) -> None:
        self.running.pop(trial_id, None)
        self.silent.discard(trial_id)

    def _held_up(self) -> set[str]:
        """The trials that wait for room for their workers, where that is certain: all that are silent do."""
        return self.silent if self.waiting >= len(self.silent) else set()

    def _doing(self) -> str:
        """What there is to say after a while without an event."""
        if not self.running:
            return "waiting for room on the cluster: other work holds it"
        held_up = self._held_up()
        epochs = ", ".join(f"{i} in epoch {self._epochs(i) + 1}" for i in self.running if i not in held_up)
        parts = [f"running: trial {epochs}{self._eta()}"] if epochs else []
        if self.waiting:
            names = ", ".join(i for i in self.running if i in held_up)
            who = f"trial {names}" if names else f"{self.waiting} of these trials"
            parts.append(f"{who}: {cluster.waiting_for(self.allocation.wanted)}")
        return "; ".join(parts)

    def _total(self) -> int:
        return self.space.tune.trials if self.trials.kind == "trials" else len(self.trials.known)

    def _so_far(self) -> str:
        over = sum(trial.over for trial in self.trials)
        return f"; {over} of {self._total()} trials done{self._eta()}"

    def _eta(self) -> str:
        """The estimated remaining time, from the mean of the trials that are over; running ones count as half done."""
        over = [trial.seconds for trial in self.trials if trial.over and trial.seconds]
        left = self._total() - sum(trial.over for trial in self.trials) - len(self.running) / 2
        if not over or left <= 0:
            return ""
        minutes = sum(over) / len(over) * left / self.allocation.trials_at_once / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"

    def _pass_on_notes(self, trial_id: str) -> None:
        path = self.trials.results_dir / self.trials.kind / trial_id / folder.NOTES
        notes = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for note in notes[self.noted.get(trial_id, 0) :]:
            self._say(trial_id, note)
        self.noted[trial_id] = len(notes)

    def _epochs(self, trial_id: str) -> int:
        history = self.trials.known[trial_id].history
        return int(history[-1]["epoch"]) if history else 0

    def _say(self, trial_id: str, text: str, always: bool = False) -> None:
        if self.live is None or always:  # the table shows the rest
            self.console.print(titled(f"trial {trial_id}", f"  {text}"))
        self.last_line = time.monotonic()


def short(value: Any) -> str:
    """A value, short enough for a line."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).rsplit("/", 1)[-1]


def _reason(error_file: Path) -> str:
    """One line on an error from Tune's file: the exception of this project if there is one, with its full name, else
    that a process died, else the last exception that is not Ray's. Ray's own messages refer to its documentation."""
    text = error_file.read_text(encoding="utf-8").rpartition("Failure # ")[2]
    raised = [line for line in text.splitlines() if _EXCEPTION.fullmatch(line)]
    if ours := [line for line in raised if line.startswith("ser_ray.")]:
        return ours[-1]
    if death := failures.death(text):
        return death
    others = [line for line in raised if not line.startswith("ray.")]
    return others[-1] if others else "its process died"


def _name(kind: type[Exception]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
