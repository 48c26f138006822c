"""Trials under Tune: a process that dies, wherever and of whatever, ends no search, and is begun so often at most."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.tune.schedulers import FIFOScheduler
from rich.console import Console
from search_fixtures import SEARCH, record, space

from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.runtime import allocation, tuner
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.searchers import OptunaSearcher
from ser_ray.trials.records import ATTEMPTS, Trials


@pytest.mark.parametrize("error", [OutOfMemoryError("low on memory"), NodeDiedError("gone"), WorkerCrashedError()])
def test_every_death_of_an_actor_is_one_for_tune(error):
    """What Ray raises where it ended the process itself would otherwise end the whole search."""
    heard: list[Exception] = []
    manager = RayActorManager.__new__(RayActorManager)
    manager._failed_actor_ids, manager._cleanup_actor = set(), lambda tracked_actor: None
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: heard.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    with tuner._surviving_every_actor_death():
        manager._actor_task_failed(tracked_actor_task=task, exception=error)
    assert [type(error) for error in heard] == [RayActorError]
    assert str(error) in str(heard[0])
    with pytest.raises(RuntimeError, match="unexpected"):
        manager._actor_task_failed(tracked_actor_task=task, exception=error)


def plan_in(directory: Path, settings: SearchSpace) -> RunPlan:
    """A plan of trials that read nothing, one at once, whose results folder is ``directory``."""
    experiment = settings.experiment.model_copy(update={"name": directory.name})
    storage = settings.storage.model_copy(update={"results": str(directory.parent)})
    own = settings.model_copy(update={"experiment": experiment, "storage": storage})
    one = allocation.Allocation(1, allocation.Worker(1.0, 0.0), 1, 1, allocation.Node(2))
    return RunPlan(own, one, (), {}, {}, "", (), 0.0, 0)


@pytest.fixture
def dying(tmp_path, monkeypatch, ray_cluster) -> Callable[..., tuple[Trials, str]]:
    """Runs a search of two trials of three epochs on Ray, in which the first dies as it is told to, and no other."""

    def search(point: str) -> tuple[Trials, str]:
        def run_trial(point_of: dict, plan: RunPlan, kind: str, die: str, **_: object) -> None:
            where, name = plan.directory(kind), point_of["trial_id"]
            history = folder.trial_history(where / name)
            begun = len(history)

            def at(place: str, epoch: int) -> None:
                if name == "001" and die == place and (die == "first" or epoch == begun + 1):
                    os.kill(os.getpid(), signal.SIGKILL)

            at("first", 1)
            if begun == 3:
                report(history[-1])  # who watched has not heard of it
            for epoch in range(begun + 1, 4):
                at("epoch", epoch - 1)
                (where / name / f".epoch_{epoch:03d}").mkdir(parents=True, exist_ok=True)
                at("save", epoch - 1)
                folder.append_history(where / name, lines[epoch - 1])
                at("line", epoch)
                report(lines[epoch - 1])

        # By value into the process of a trial, which cannot import this file.
        report, lines = ray.tune.report, [record(n, 0.1 * n, 0.1 * n) | {"last": n == 3} for n in (1, 2, 3)]
        monkeypatch.setattr(tuner, "run_trial", lambda config, **rest: run_trial(config, die=point, **rest))
        text = io.StringIO()
        planned = plan_in(tmp_path, space(SEARCH, trials=2, scheduler="none", concurrency=1))
        trials = Trials(tmp_path, planned.space.search)
        searcher = OptunaSearcher(planned.space, trials)
        tuner.run(planned, trials, searcher, FIFOScheduler(), {}, Console(file=text, width=500))
        return Trials(tmp_path, planned.space.search), text.getvalue()

    return search


@pytest.mark.ray
@pytest.mark.parametrize(
    ("point", "status", "attempts"),
    [
        pytest.param("first", "failed", ATTEMPTS, marks=pytest.mark.slow),
        ("epoch", "finished", 3),
        pytest.param("save", "finished", 3, marks=pytest.mark.slow),
        pytest.param("line", "finished", 4, marks=pytest.mark.slow),
    ],
)
def test_a_search_ends_wherever_a_process_of_it_dies(dying, point, status, attempts):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    trials, said = dying(point)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == handlers, "Tune leaves its own"
    assert [tried.status for tried in trials] == [status, "finished"]
    assert said.count("trial 001  starts") + said.count("trial 001  continues after") == attempts
    assert "docs.ray.io" not in said
    if status == "finished":
        assert [line["epoch"] for line in trials.known["001"].history] == [1, 2, 3]
    else:
        assert trials.known["001"].error == f"its process died ({ATTEMPTS} times)"
