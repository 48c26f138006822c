"""Run trials under Ray Tune, which starts their processes, hands them what a searcher gives, and stops what a scheduler
stops; a trial whose process dies is continued."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import ray.data
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.plan import RunPlan
from ser_ray.runtime.trial import run_trial
from ser_ray.runtime.watch import Watch
from ser_ray.schema import LostMessageError
from ser_ray.trials.records import Trials

TRAINABLE: Final = "SER_RAY_TRAINABLE"
"""If this is set, to module:function, a search calls that for every trial instead of `run_trial`, with the same
arguments: for tests of what happens around training."""
TUNE_STATE = ".tune"
"""Where Tune keeps its own state while it runs. It is never read: a search continues from its trials' folders."""


def run(
    planned: RunPlan,
    trials: Trials,
    searcher: Searcher,
    scheduler: TrialScheduler,
    speech: Mapping[str, ray.data.Dataset],
    console: Console,
) -> None:
    """Run the trials that ``searcher`` gives, as many at once as fit, until it has no more.

    ``speech``: the waveforms that trials share. Raises UserError where the results folder can no longer be written,
    LostMessageError where Ray tells nothing any more, KeyboardInterrupt where the user stopped it.
    """
    at_once = planned.allocation.trials_at_once
    watch = Watch(planned.space, trials, planned.allocation, console)
    trainable = tune.with_resources(
        tune.with_parameters(_trainable(), plan=planned, kind=trials.kind, speech=speech),
        _resources(planned.allocation),
    )
    state = trials.results_dir / TUNE_STATE
    shutil.rmtree(state, ignore_errors=True)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=sys.maxsize,
            max_concurrent_trials=at_once,
            search_alg=searcher,
            scheduler=scheduler,
            reuse_actors=True,  # starting a process and importing torch and transformers takes eight seconds
        ),
        run_config=tune.RunConfig(name=state.name, storage_path=str(state.parent), verbose=0, callbacks=[watch]),
    )
    try:
        with watch.shown(), _surviving_every_actor_death(), _restoring_signal_handlers():
            tuner.fit()
    except tune.TuneError:
        if trials.error is None:
            raise
    except (KeyboardInterrupt, LostMessageError):
        trials.release()
        raise
    finally:
        shutil.rmtree(state, ignore_errors=True)
    if trials.error is not None:
        raise trials.error
    # After Ctrl-C Tune returns without an error, with unfinished trials.
    if any(not trial.over for trial in trials):
        trials.release()
        raise KeyboardInterrupt


# -- below: how it is done


@contextmanager
def _surviving_every_actor_death() -> Iterator[None]:
    """Make Tune survive every death of an actor. By itself it continues only after a RayActorError: a process that Ray
    killed for its memory, or that was lost with its node, raises another error, which ends all trials (RayActorManager
    of Ray 2.60)."""
    original = RayActorManager._actor_task_failed

    def as_actor_error(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = RayActorError(error_msg=f"{kind.__module__}.{kind.__name__}: {exception}")
        original(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = as_actor_error
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


@contextmanager
def _restoring_signal_handlers() -> Iterator[None]:
    """Tune handles SIGINT and SIGUSR1 while it runs, and leaves its handlers behind: the next Ctrl-C would be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trainable() -> Callable[..., None]:
    """`run_trial`, or the function that `TRAINABLE` names."""
    module, _, function = os.environ.get(TRAINABLE, "").partition(":")
    return getattr(importlib.import_module(module), function) if module else run_trial


def _resources(allocation: Allocation) -> dict[str, float]:
    """Resources of a trial's process: those of its only worker. With several it just waits; they have their own."""
    one = allocation.worker
    return {"cpu": one.cpus, "gpu": one.gpus} if allocation.workers == 1 else {"cpu": 0.01}
