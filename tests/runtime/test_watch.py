"""What a person sees of a search: the same trials told to `Watch` in a terminal and in a log."""

from __future__ import annotations

import io
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.train import WorkerGroupError
from rich.console import Console
from search_fixtures import SEARCH, record, space

import ser_ray.runtime.watch
from ser_ray.evaluation import folder
from ser_ray.runtime import cluster, failures
from ser_ray.runtime.allocation import Allocation, Node, Worker
from ser_ray.runtime.watch import Watch
from ser_ray.schema import MemoryShortageError, ProcessDiedError, StorageError, UserError
from ser_ray.trials.records import ATTEMPTS, Trials

VALUES = {"adapter.method": "lora", "adapter.rank": 8, "optimizer.lr": 0.000312345}


def trial(number: int, **last: Any) -> Any:
    return SimpleNamespace(config={"trial_id": f"{number:03d}", "values": VALUES}, last_result=last)


def failed(number: int, error: BaseException, directory: Path) -> Any:
    """As Tune notes an error: one file, added to."""
    path = directory / f"error-{number}.txt"
    with path.open("a") as file:
        file.write(f"Failure # 1 (occurred at 2026-11-23_07-32-54)\n{error}\n")
    return SimpleNamespace(config={"trial_id": f"{number:03d}", "values": VALUES}, error_file=str(path))


ALONE = Allocation(1, Worker(1.0, 0.0), pool=1, trials_at_once=1, total=Node(2.0))


def watch(directory: Path, terminal: bool = False, allocation: Allocation = ALONE) -> tuple[Watch, io.StringIO]:
    settings, text = space(SEARCH, trials=3), io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, highlight=False, color_system=None)
    trials = Trials(directory, settings.search)
    for number in (1, 2):
        trials.add(f"{number:03d}", VALUES)
    return Watch(settings, trials, allocation, console), text


def epoch(seen: Watch, number: int, uar: float, last: bool = False) -> None:
    name = f"{number:03d}"
    reached = len(seen.trials.known[name].history) + 1
    line = record(reached, uar, uar) | {"last": last}
    folder.append_history(seen.trials.results_dir / "trials" / name, line)
    seen.on_trial_result(0, [], trial(number), line | {"time_total_s": 60.0 * reached})


def task_error(cause: Exception) -> RayTaskError:
    """As it comes from a process that raised it."""
    try:
        raise cause
    except Exception as error:
        return RayTaskError("run_trial", "".join(traceback.format_exception(error)), error)


def test_a_log_has_a_line_for_everything(tmp_path):
    seen, text = watch(tmp_path)
    seen.on_trial_start(0, [], trial(1))
    (tmp_path / "trials/001/notes.txt").write_text("frozen prefix: found\n")
    seen.on_step_end(0, [])
    epoch(seen, 1, 0.4)
    epoch(seen, 1, 0.5, last=True)
    seen.on_trial_complete(0, [], trial(1, last=True, time_total_s=120.0))
    lines = text.getvalue().splitlines()
    assert lines[0] == "trial 001  starts: adapter.method=lora, adapter.rank=8, optimizer.lr=0.000312"
    assert lines[1] == "trial 001  frozen prefix: found"
    assert "epoch  2" in lines[3]
    assert lines[4] == "trial 001  finished; 1 of 3 trials done, about 4 min left"
    assert [row["status"] for row in folder.read_trial_rows(tmp_path)] == ["finished", "running"]
    assert [row["seconds"] for row in folder.read_trial_rows(tmp_path)] == ["120.0", "0.0"]


def test_a_terminal_shows_one_table(tmp_path):
    seen, text = watch(tmp_path, terminal=True)
    with seen.shown():
        seen.on_trial_start(0, [], trial(1))
        epoch(seen, 1, 0.5, last=True)
        seen.on_trial_complete(0, [], trial(1, last=True, time_total_s=60.0))
        seen.on_trial_start(0, [], trial(2))
        epoch(seen, 2, 0.7)
        drawn = Console(file=io.StringIO(), width=120)
        drawn.print(seen.table())
    table = drawn.file.getvalue()
    assert "1 of 3 trials done, about 2 min left" in table
    running, finished = table.splitlines()[-4:-2] if not table.splitlines()[-1] else table.splitlines()[-3:-1]
    assert running.split()[:4] == ["002", "running", "1", "0.700"]
    assert finished.split()[:4] == ["001", "finished", "1", "0.500"]
    assert "epoch  1" not in text.getvalue()


def test_a_trial_that_goes_on_says_after_what(tmp_path):
    seen, text = watch(tmp_path)
    folder.append_history(tmp_path / "trials" / "001", record(3, 0.4, 0.4))
    seen.on_trial_start(0, [], trial(1))
    assert "continues after epoch 3: " in text.getvalue()


def test_a_stopped_trial_is_no_finished_one(tmp_path):
    seen, text = watch(tmp_path)
    seen.on_trial_start(0, [], trial(1))
    epoch(seen, 1, 0.4)
    seen.on_trial_complete(0, [], trial(1, last=False, time_total_s=60.0))
    assert seen.trials.known["001"].status == "stopped"
    assert "stopped by the scheduler" in text.getvalue()


def test_what_died_goes_on_and_what_was_refused_does_not(tmp_path):
    seen, text = watch(tmp_path)
    for attempt in range(1, ATTEMPTS + 1):
        seen.trials.begin("001")
        seen.on_trial_start(0, [], trial(1))
        seen.on_trial_error(0, [], failed(1, RayActorError(), tmp_path))
        assert seen.trials.known["001"].over == (attempt == ATTEMPTS)
    seen.on_trial_start(0, [], trial(2))
    seen.on_trial_error(
        0, [], failed(2, task_error(UserError("epoch 3: the loss is nan; lower optimizer.lr")), tmp_path)
    )
    assert seen.trials.known["002"].status == "failed"
    assert seen.trials.known["002"].error == "epoch 3: the loss is nan; lower optimizer.lr"
    assert text.getvalue().count("continues from its last epoch: its process died") == ATTEMPTS - 1


def test_a_full_disk_ends_the_search(tmp_path):
    seen, _ = watch(tmp_path)
    seen.on_trial_start(0, [], trial(1))
    full = task_error(StorageError("/results/x: No space left on device; make room"))
    with pytest.raises(StorageError, match="/results/x: No space left on device; make room"):
        seen.on_trial_error(0, [], failed(1, full, tmp_path))
    assert not seen.trials.known["001"].over


def test_an_error_of_ours_says_its_last_line(tmp_path):
    seen, text = watch(tmp_path)
    seen.on_trial_start(0, [], trial(1))
    seen.on_trial_error(0, [], failed(1, task_error(RuntimeError("boom")), tmp_path))
    assert "continues from its last epoch: RuntimeError: boom" in text.getvalue()


RAYS_ADVICE = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node was 22.8GB / 24.0GB.\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/debug.html. "
    "To adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold` when starting Ray."
)
FULL = "Ray killed its process because the machine's memory was nearly full; lower tune.concurrency"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (task_error(ValueError("boom")), "ValueError: boom"),
        (
            task_error(RuntimeError("CUDA error: assert\nCompile with `TORCH_USE_CUDA_DSA`")),
            "RuntimeError: CUDA error: assert",
        ),
        (task_error(KeyError("x")), "KeyError: 'x'"),
        (RayActorError(), "its process died"),
        (ActorDiedError(), "its process died"),
        (RayActorError(error_msg=str(WorkerCrashedError())), "its process died"),
        (ActorDiedError(task_error(ImportError("no module x"))), "ImportError: no module x"),
        (RayActorError(error_msg=f"ray.exceptions.OutOfMemoryError: {RAYS_ADVICE}"), FULL),
        (OutOfMemoryError(RAYS_ADVICE), FULL),
        (task_error(OutOfMemoryError(RAYS_ADVICE)), FULL),
        (task_error(ProcessDiedError("its process died")), "its process died"),
        (task_error(WorkerGroupError(f"rank 1:\n{RAYS_ADVICE}\nrank 0:\nRuntimeError: closed by peer", {})), FULL),
    ],
)
def test_the_reason_is_one_line_and_no_advertisement(tmp_path, error, said):
    seen, text = watch(tmp_path)
    seen.trials.begin("001")
    seen.on_trial_start(0, [], trial(1))
    seen.on_trial_error(0, [], failed(1, error, tmp_path))
    reason = seen.trials.known["001"].error
    assert reason.startswith(said)
    assert "\n" not in reason
    assert "docs.ray.io" not in reason
    shown = " ".join(text.getvalue().split())
    assert shown.endswith(f"trial 001 was interrupted and continues from its last epoch: {reason}")


def test_short_memory_is_tried_again_with_half_once(tmp_path):
    seen, text = watch(tmp_path)
    short = task_error(MemoryShortageError("out of memory: lower experiment.batch_seconds (60)"))
    for _ in range(2):
        seen.trials.begin("001")
        seen.on_trial_start(0, [], trial(1))
        seen.on_trial_error(0, [], failed(1, short, tmp_path))
    first, second = (line for line in text.getvalue().splitlines() if "out of memory" in line)
    assert "is retried with half of batch_seconds: out of memory: lower experiment.batch_seconds (60)" in first
    assert "failed: out of memory: lower experiment.batch_seconds (60) (half of batch_seconds was tried)" in second
    assert seen.trials.known["001"].status == "failed"


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OutOfMemoryError(RAYS_ADVICE), ProcessDiedError),
        (ActorDiedError(), ProcessDiedError),
        (MemoryShortageError("out of memory"), MemoryShortageError),
        (task_error(MemoryShortageError("out of memory")), MemoryShortageError),
        (UserError("a line"), UserError),
        (RuntimeError("boom"), None),
        (task_error(RuntimeError("boom")), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_worker_died_of_keeps_its_kind(failure, kind):
    found = failures.user_error(failure)
    assert type(found) is (kind or type(None))
    assert "\n" not in str(found)


def test_a_log_says_that_epochs_run_and_that_a_full_cluster_is_waited_for(tmp_path, monkeypatch):
    seen, text = watch(tmp_path)
    seen.on_step_end(0, [])
    assert text.getvalue() == "", "not before it has been silent for a while"
    monkeypatch.setattr(ser_ray.runtime.watch, "HEARTBEAT_S", -1.0)
    seen.on_step_end(0, [])
    assert "waiting for room on the cluster: other work holds it" in text.getvalue()
    seen.on_trial_start(0, [], trial(1))
    seen.on_step_end(0, [])
    assert text.getvalue().splitlines()[-1].startswith("  ... running: trial 001 in epoch 1")


def test_trials_whose_workers_wait_are_not_called_running(tmp_path, monkeypatch):
    """Several workers have resources of their own, which their trial asks for after it has started."""
    pending = 2
    monkeypatch.setattr(ser_ray.runtime.watch, "HEARTBEAT_S", -1.0)
    monkeypatch.setattr(cluster, "LOOK_S", -1.0)
    monkeypatch.setattr(cluster, "trainers_waiting", lambda workers: pending * (workers == 2))
    monkeypatch.setattr(cluster, "waiting_for", lambda wanted: f"waiting for {wanted}; 0 of 4 CPUs are free")
    two = replace(ALONE, workers=2, trials_at_once=2, total=Node(4.0))
    seen, text = watch(tmp_path, allocation=two)
    seen.console.width = 200

    def beat() -> str:
        seen.on_step_end(0, [])
        return text.getvalue().splitlines()[-1]

    def statuses() -> list[str]:
        return list(seen.table().columns[1].cells)

    wanted = "waiting for 2 x (1 CPUs, 0 GPUs), each on one node; 0 of 4 CPUs are free"
    seen.on_trial_start(0, [], trial(1))
    seen.on_trial_start(0, [], trial(2))
    assert beat() == f"  ... trial 001, 002: {wanted}"
    assert statuses() == ["waiting", "waiting"]
    pending = 1
    assert beat() == f"  ... running: trial 001 in epoch 1, 002 in epoch 1; 1 of these trials: {wanted}"
    epoch(seen, 1, 0.4)
    assert beat() == f"  ... running: trial 001 in epoch 2; trial 002: {wanted}"
    assert statuses() == ["running", "waiting"]
    pending = 0
    assert beat() == "  ... running: trial 001 in epoch 2, 002 in epoch 1"
    assert statuses() == ["running", "running"]
