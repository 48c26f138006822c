"""Epochs in TensorBoard's and MLflow's own files, read back by their own readers."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient
from search_fixtures import SEARCH, record, space
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import crc32c

from ser_ray.schema import UserError
from ser_ray.trials import logs


def events(path) -> list[Event]:
    """TensorBoard's file format: length (8 bytes), its checksum (4), an event, its checksum (4)."""
    content, found = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = content[12 : 12 + length]
        assert crc32c(event) is not None
        found.append(Event.FromString(event))
        content = content[16 + length :]
    return found


def test_tensorboard_has_every_epoch(tmp_path):
    (log,) = logs.open_logs(space(SEARCH, log=["tensorboard"]), tmp_path)
    for epoch in (1, 2):
        log("001", {"optimizer.lr": 1e-4}, record(epoch, epoch / 10, epoch / 10))
    (file,) = (tmp_path / "tensorboard" / "001").iterdir()
    seen = {}
    while (2, "dev_kappa") not in seen:  # a thread writes
        seen = {(e.step, v.tag): v.simple_value for e in events(file) for v in e.summary.value if v.simple_value}
    assert seen[1, "dev_uar"] == pytest.approx(0.1)
    assert seen[2, "dev_uar"] == pytest.approx(0.2)
    assert seen[2, "seconds"] == 2.0


def test_mlflow_has_every_epoch_and_goes_on_with_a_continued_search(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for epoch in (1, 2):  # a process each
        (log,) = logs.open_logs(space(SEARCH, log=["mlflow"]), tmp_path)
        log("001", {"optimizer.lr": 1e-4}, record(epoch, epoch / 10, epoch / 10))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert run.data.params == {"optimizer.lr": "0.0001"}
    history = client.get_metric_history(run.info.run_id, "dev_uar")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]


def test_nothing_is_logged_unasked(tmp_path):
    assert logs.open_logs(space(SEARCH), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install mlflow-skinny"):
        logs.open_logs(space(SEARCH, log=["mlflow"]), tmp_path)
