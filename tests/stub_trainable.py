"""A trainable for tests of what happens around training: histories and checkpoints in milliseconds, no model trained.

``SER_RAY_TRAINABLE=stub_trainable:run_trial`` lets a search call it; `environment` gives all that such a process
needs. Around it everything is that of `ser_ray.runtime.trial.run_trial`: notes, feature caches, files, reports.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from ser_ray import config, disk
from ser_ray.config import Experiment
from ser_ray.evaluation import folder
from ser_ray.runtime import trial as trials

CHECKPOINTS = "STUB_CHECKPOINTS"
"""Where untrained checkpoints are kept, to be copied: a folder that all processes of the search see."""
EPOCH_S = "STUB_EPOCH_S"
"""Seconds that an epoch takes."""
TRAINABLE = "stub_trainable:run_trial"
TESTS = Path(__file__).resolve().parent


def settings(checkpoints: Path, epoch_s: float = 0.0) -> dict[str, str]:
    """Variables that every process of a trial needs."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {CHECKPOINTS: str(checkpoints), EPOCH_S: str(epoch_s), "PYTHONPATH": path}


def environment(checkpoints: Path, epoch_s: float = 0.0) -> dict[str, str]:
    """Variables of a command, and of the Ray that it runs on, whose searches train nothing."""
    return settings(checkpoints, epoch_s) | {"SER_RAY_TRAINABLE": TRAINABLE}


def run_trial(*arguments: Any, **named: Any) -> None:
    """`ser_ray.runtime.trial.run_trial`, but for the training itself."""
    with mock.patch.object(trials, "fit_on_ray", fit):
        trials.run_trial(*arguments, **named)


def fit(
    trial: trials.Trial, datasets: Any = None, ray_callbacks: Any = (), callback: trials.EpochCallback | None = None
) -> None:
    """The epochs of a trial, continued where it left off, as `ser_ray.training.loop` would report them."""
    from ray import tune

    experiment, directory, metric = Experiment.model_validate(trial.experiment), Path(trial.directory), trial.metric
    callback = callback or tune.report
    source = untrained(experiment, Path(os.environ[CHECKPOINTS]))
    last = trials._last_checkpoint(directory)
    told: dict[str, Any] = disk.read_json(last / "metrics.json") if last else {}
    if told.get("last"):
        callback(told)  # the driver may have died before it received it
    while not told.get("last"):
        epoch = told["epoch"] + 1 if told else int(experiment.head.init != "probe")
        time.sleep(float(os.environ[EPOCH_S]) if epoch else 0.0)
        told = record(experiment, epoch, metric, told)
        trials._write_epoch(directory, told, saver(source, experiment, told))
        callback(told)


def record(experiment: Experiment, epoch: int, metric: str, before: folder.Record) -> folder.Record:
    """A line of a history: figures that the values and the epoch decide, rising to a height of their own."""
    chance = random.Random(config.fingerprint(config.to_dict(experiment) | {"name": ""}))
    height = chance.uniform(0.4, 0.8) * (1 - 0.5 ** (epoch + 1))
    names = ("uar", "accuracy", "macro_f1", "kappa")
    metrics = {f"dev_{name}": height - 0.01 * place for place, name in enumerate(names)}
    best, best_epoch = before.get(f"best_{metric}", -1.0), before.get("best_epoch", 0)
    if metrics[metric] > best:
        best, best_epoch = metrics[metric], epoch
    following = epoch + 1
    should_continue = following <= experiment.epochs and following - best_epoch <= experiment.patience
    return {
        "epoch": epoch,
        "train_loss": 2.0 / epoch if epoch else None,
        "lr": experiment.optimizer.lr,
        "seconds": float(os.environ[EPOCH_S]),
        "utterances_per_s": 1.0,
        "input_wait": 0.0,
        "peak_memory_mb": 100.0,
        "dev_loss": 2.0 - height,
        **metrics,
        f"best_{metric}": best,
        "best_epoch": best_epoch,
        "last": not should_continue,
        "trainable_parameters": 1000 * experiment.adapter.rank,
    }


def saver(source: Path, experiment: Experiment, metrics: folder.Record) -> Callable[[Path], None]:
    """Writes a checkpoint of an experiment into a directory."""

    def save(directory: Path) -> None:
        shutil.copytree(source, directory)
        disk.write_text(directory / "experiment.yaml", config.dump(experiment))
        disk.write_json(directory / "metrics.json", metrics)

    return save


def untrained(experiment: Experiment, checkpoints: Path) -> Path:
    """The checkpoint of an untrained model of that shape: the first who asks builds and saves it."""
    parts = config.to_dict(experiment)
    shape = config.fingerprint([parts[name] for name in ("backbone", "adapter", "head", "emotions")])
    place = checkpoints / shape
    checkpoints.mkdir(parents=True, exist_ok=True)
    with disk.locked(checkpoints / f"{shape}.lock"):
        if not (place / "metrics.json").is_file():
            from ser_ray.models import checkpoint
            from ser_ray.models.classifier import build

            checkpoint.save(build(experiment), place, {})
    return place
