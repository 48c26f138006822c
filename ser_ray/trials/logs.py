"""Log epochs to TensorBoard or MLflow if ``tune.log`` asks for it: the same metrics as in every history.jsonl.

tensorboard --logdir results/NAME/tensorboard
mlflow ui --backend-store-uri sqlite:///results/NAME/mlflow.db      (or the server that MLFLOW_TRACKING_URI names)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ser_ray.config import SearchSpace
from ser_ray.evaluation.folder import Record
from ser_ray.schema import UserError

Log = Callable[[str, Mapping[str, Any], Record], None]
"""Receives a trial's id, its values and an epoch's record."""


def open_logs(space: SearchSpace, results_dir: Path) -> list[Log]:
    """The logs that ``tune.log`` names.

    Raises UserError if it names MLflow and that is not installed.
    """
    made = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    return [made[name](space, results_dir) for name in space.tune.log]


def _tensorboard(space: SearchSpace, results_dir: Path) -> Log:
    from tensorboardX import SummaryWriter  # comes with ray[tune]

    writers: dict[str, Any] = {}

    def log(trial_id: str, values: Mapping[str, Any], record: Record) -> None:
        if trial_id not in writers:
            writers[trial_id] = SummaryWriter(str(results_dir / "tensorboard" / trial_id), flush_secs=1)
            writers[trial_id].add_text("values", ", ".join(f"{key}={value}" for key, value in values.items()))
        for name, value in _numbers(record).items():
            writers[trial_id].add_scalar(name, value, record["epoch"])

    return log


def _mlflow(space: SearchSpace, results_dir: Path) -> Log:
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("tune.log: mlflow is not installed; pip install mlflow-skinny, or leave it out")
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results_dir / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    name = space.experiment.name
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    runs = {run.data.tags["trial_id"]: run.info.run_id for run in client.search_runs([experiment])}

    def log(trial_id: str, values: Mapping[str, Any], record: Record) -> None:
        if trial_id not in runs:
            run = client.create_run(experiment, tags={"trial_id": trial_id}, run_name=trial_id)
            runs[trial_id] = run.info.run_id
            for key, value in values.items():
                client.log_param(runs[trial_id], key, value)
        for key, value in _numbers(record).items():
            client.log_metric(runs[trial_id], key, value, step=record["epoch"])

    return log


def _numbers(record: Record) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
