"""What a person sees of a search while it runs: a live table in a terminal, the same as lines in a job's log."""

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
from rich.markup import escape
from rich.table import Table

from ser_ray import cluster
from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.schema import MemoryShortageError, ProcessDiedError, StorageError, UserError
from ser_ray.search.logs import open_logs
from ser_ray.search.trials import Trials

HEARTBEAT_S: Final = 20.0
"""A line at least this often in a log, since an epoch of a large backbone takes minutes."""
_EXCEPTION: Final = re.compile(r"((\w+\.)+[A-Z]\w*|[A-Z]\w*(Error|Exception|Exit|Interrupt))(: .*)?")
"""How a traceback ends: the name of an exception, and what it says."""
ROWS: Final = 12
"""Trials that the live table shows: those that run, then the best."""


class Watch(tune.Callback):
    """Passes on what Tune says of trials: to `Trials`, which writes it down, and to people."""

    def __init__(self, space: SearchSpace, trials: Trials, at_once: int, console: Console) -> None:
        self.space, self.trials, self.at_once, self.console = space, trials, at_once, console
        self.logs = open_logs(space, trials.results_dir)
        self.live: Live | None = None
        self.last_line = self.started = time.monotonic()
        self.noted: dict[str, int] = {}
        self.running: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks with its state, which is never read; a terminal cannot be pickled."""
        return self.__dict__ | {"console": None, "live": None, "logs": []}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """In a terminal, the table while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True) as self.live:
            yield
        self.live = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what a trial will try, or that it goes on."""
        trial_id, values = trial.config["trial_id"], trial.config["values"]
        tried = self.trials.start(trial_id)
        self.running[trial_id] = time.monotonic()
        done = f"goes on after epoch {tried.history[-1]['epoch']}: " if tried.history else "starts: "
        self._say(trial_id, done + ", ".join(f"{key}={short(value)}" for key, value in values.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say how an epoch went."""
        trial_id = trial.config["trial_id"]
        tried = self.trials.update(trial_id, result.get("time_total_s"))
        for log in self.logs:
            log(trial_id, tried.values, tried.history[-1])
        self._say(trial_id, folder.describe_epoch(result, self.space.tune.metric))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how a trial ended: by itself, or stopped by the scheduler."""
        trial_id, last = trial.config["trial_id"], trial.last_result or {}
        self.running.pop(trial_id, None)
        status = "finished" if last.get("last", False) else "stopped"
        self.trials.update(trial_id, last.get("time_total_s"), status=status)
        how = "finished" if status == "finished" else "stopped by the scheduler"
        self._say(trial_id, how + self._so_far())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why a trial failed; one whose processes died goes on."""
        trial_id, reason = trial.config["trial_id"], _reason(Path(trial.error_file))
        self.running.pop(trial_id, None)
        kind, _, message = reason.partition(": ")
        if kind == _name(StorageError):  # no other trial would fare better; all go on with the next command
            self.trials.error = StorageError(message)
            raise self.trials.error
        if kind == _name(UserError):
            tried, what = self.trials.update(trial_id, status="failed", error=message), ""
        elif kind == _name(MemoryShortageError):
            tried, what = self.trials.short_of_memory(trial_id, message), "is tried again with half of batch_seconds"
        else:
            message = message if kind == _name(ProcessDiedError) else reason
            tried, what = self.trials.interrupted(trial_id, message), "was cut off and goes on from its last epoch"
        self._say(trial_id, f"failed: {tried.error}" if tried.over else f"{what}: {message}", always=True)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """What trials say before their first epoch, and a sign of life while epochs are long."""
        for trial_id in self.running:
            self._pass_on_notes(trial_id)
        if self.running and not self.live and time.monotonic() - self.last_line > HEARTBEAT_S:
            waiting = ", ".join(f"{i} in epoch {self._epochs(i) + 1}" for i in self.running)
            self.console.print(f"  ... running: trial {waiting}{self._eta()}", style="dim")
            self.last_line = time.monotonic()
        if not self.running and not self.live and time.monotonic() - self.last_line > HEARTBEAT_S:
            self.console.print("  ... waiting for room on the cluster: other work holds it", style="dim")
            self.last_line = time.monotonic()

    def table(self) -> Table:
        """The trials that run, and the best of the others."""
        metric = self.space.tune.metric
        over = sum(tried.over for tried in self.trials)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
        table.title = f"{over} of {self._total()} trials done{self._eta()}"
        for name in ("trial", "", "epoch", metric.replace("_", " "), *self.space.search, "time"):
            table.add_column(escape(name), overflow="fold")
        order = sorted(self.trials, key=lambda t: (t.trial_id not in self.running, -t.best.get(metric, -1.0)))
        for tried in order[:ROWS]:
            begun = self.running.get(tried.trial_id)
            seconds = tried.seconds if begun is None else time.monotonic() - begun
            status = "running" if begun is not None else ("waits" if not tried.over else tried.status)
            figure = f"{tried.best[metric]:.3f}" if tried.best else ""
            values = [escape(short(tried.values[key])) if key in tried.values else "" for key in self.space.search]
            style = "bold" if begun is not None else "dim" if status == "failed" else None
            minutes = f"{seconds / 60:.1f} min"
            table.add_row(
                tried.trial_id, status, str(self._epochs(tried.trial_id)), figure, *values, minutes, style=style
            )
        return table

    def _total(self) -> int:
        return self.space.tune.trials if self.trials.kind == "trials" else len(self.trials.known)

    def _so_far(self) -> str:
        over = sum(known.over for known in self.trials)
        return f"; {over} of {self._total()} trials done{self._eta()}"

    def _eta(self) -> str:
        """By what the trials that are over took, one with another; those that run count as half done."""
        over = [tried.seconds for tried in self.trials if tried.over and tried.seconds]
        left = self._total() - sum(tried.over for tried in self.trials) - len(self.running) / 2
        if not over or left <= 0:
            return ""
        minutes = sum(over) / len(over) * left / self.at_once / 60
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
        if self.live is None or always:  # the table says the rest
            self.console.print(f"[bold]trial {trial_id}[/bold]  {escape(text)}")
        self.last_line = time.monotonic()


def short(value: Any) -> str:
    """A value as a line has room for it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).rsplit("/", 1)[-1]


def _reason(error_file: Path) -> str:
    """One line of what Tune noted of an error, an exception with its full name: the project's own if there is one, else
    that a process died, else the last one that is not Ray's. Ray's own words lead to its documentation."""
    text = error_file.read_text(encoding="utf-8").rpartition("Failure # ")[2]
    raised = [line for line in text.splitlines() if _EXCEPTION.fullmatch(line)]
    if ours := [line for line in raised if line.startswith("ser_ray.")]:
        return ours[-1]
    if died := cluster.death(text):
        return died
    others = [line for line in raised if not line.startswith("ray.")]
    return others[-1] if others else "its process died"


def _name(kind: type[Exception]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
