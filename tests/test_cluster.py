"""The cluster as a trial meets it: every process knows which one is its own."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import ray

from ser_ray import cluster
from ser_ray.schema import StorageError, UserError


@pytest.mark.ray
def test_workers_know_their_cluster(ray_cluster):
    """Without it Ray Train cannot free what a stopped trial held, where two clusters run on a machine."""

    @ray.remote(num_cpus=0)
    def told() -> str:
        return os.environ["RAY_ADDRESS"]

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    assert ray.get(told.remote()).rpartition(":")[2] == port


def test_an_offered_cluster_is_found_by_variable_before_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster._offered() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert cluster._offered() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster._offered() == "10.0.0.2:6379"


def test_a_cluster_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**options):
        assert options["address"] == "127.0.0.1:9"
        raise ConnectionError

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="no Ray cluster answers"):
        cluster.connect()


def test_a_disk_that_cannot_be_used_is_told_from_other_errors():
    full = OSError(errno.ENOSPC, "No space left on device", "/results")
    assert isinstance(cluster.user_error(full), StorageError)
    failed = RuntimeError("a worker failed")
    failed.__cause__ = full
    assert "/results: No space left on device" in str(cluster.user_error(failed))
    assert cluster.user_error(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert cluster.user_error(TimeoutError(errno.ETIMEDOUT, "a socket")) is None
    assert isinstance(cluster.user_error(OSError(errno.ETIMEDOUT, "timed out", "/nfs/x")), StorageError)


@pytest.mark.parametrize("ctrl_c", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_in_a_background_too(ctrl_c, number):
    """A script's background job starts with SIGINT ignored; what is sent to it by name counts all the same."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, number)}
    try:
        signal.signal(signal.SIGINT, ctrl_c)
        cluster._heed_signals()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
