"""The cluster as a trial meets it: every process knows which one is its own."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray
from ray._common.usage import usage_lib
from ray._common.utils import get_ray_address_file
from ray._private.utils import validate_socket_filepath

from ser_ray.runtime import cluster, failures
from ser_ray.schema import StorageError, UserError


@pytest.mark.ray
def test_workers_know_their_cluster(ray_cluster):
    """Without it Ray Train cannot free what a stopped trial held, where two clusters run on a machine."""

    @ray.remote(num_cpus=0)
    def told() -> str:
        return os.environ["RAY_ADDRESS"]

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    assert ray.get(told.remote()).rpartition(":")[2] == port


@pytest.mark.ray
def test_nobody_elsewhere_is_told_what_is_run(ray_cluster):
    """Ray sends statistics to its makers where they are not disabled."""

    @ray.remote(num_cpus=0)
    def told() -> bool:
        return usage_lib.usage_stats_enabled()

    assert not ray.get(told.remote())


STARTED = """
import time, psutil
from ser_ray.runtime import cluster
cluster.connect()
time.sleep(2)  # by then there would be some
commands = [p.cmdline() for p in psutil.Process().children(recursive=True)]
assert any("raylet/raylet" in command[0] for command in commands if command)
print(sum("ray::IDLE" in command[0] or any(a.endswith("default_worker.py") for a in command[1:4])
          for command in commands if command))
"""


@pytest.mark.ray
def test_a_command_waits_for_no_process_that_it_did_not_ask_for():
    """Ray starts one for every CPU, and lets nobody begin before they are there: on a busy machine for ever."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RAY_ADDRESS", "RAY_prestart_worker_first_driver")
    }
    with tempfile.TemporaryDirectory(prefix="sr") as place:  # short: Ray's sockets live below it
        environment = kept | {"RAY_TMPDIR": place}
        done = subprocess.run([sys.executable, "-c", STARTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 0


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Where Ray looks for a cluster: nothing is offered yet."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray_tmpdir"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmpdir"))
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN_S", 0.0)
    return tmp_path


@pytest.fixture
def head() -> Iterator[str]:
    """The address of somebody who answers as a server of gRPC does."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def nobody() -> str:
    """An address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def offer(place: Path, address: str) -> Path:
    """As ``ray start`` does."""
    path = place / "ray" / "ray_current_cluster"
    path.parent.mkdir(parents=True)
    path.write_text(address)
    return path


@pytest.mark.parametrize("variables", [("RAY_TMPDIR", "TMPDIR"), ("TMPDIR",), ()], ids=str)
def test_a_cluster_is_looked_for_where_ray_looks(places, monkeypatch, variables):
    for name in {"RAY_TMPDIR", "TMPDIR"} - set(variables):
        monkeypatch.delenv(name)
    theirs = Path(get_ray_address_file(None))
    assert cluster._system_temp() / "ray" / "ray_current_cluster" == theirs


def test_an_offered_cluster_is_found_by_variable_before_file(places, monkeypatch, head):
    assert cluster._offered() is None
    offer(places / "ray_tmpdir", f"{head}\n")
    assert cluster._offered() == head
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    assert cluster._offered() == "ray://elsewhere:10001"


@pytest.mark.parametrize("address", ["nobody", ""], ids=["stale", "empty"])
def test_a_file_of_a_cluster_that_is_gone_is_named(places, nobody, address):
    path = offer(places / "ray_tmpdir", nobody if address else "")
    with pytest.raises(UserError, match=f"{path}: names a Ray at .*where none answers; remove the file"):
        cluster._offered()


def test_a_port_that_another_program_has_now_is_no_cluster(places):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        path = offer(places / "ray_tmpdir", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=f"{path}: names a Ray at"):
            cluster._offered()


def test_a_cluster_of_another_user_is_not_joined_by_accident(places, monkeypatch, head):
    path = offer(places / "ray_tmpdir", head)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(UserError, match=f"{path}: belongs to the Ray of another user; set RAY_TMPDIR"):
        cluster._offered()
    monkeypatch.setenv("RAY_ADDRESS", head)
    assert cluster._offered() == head, "who names it means it"


def test_a_cluster_that_does_not_answer_is_said(places, monkeypatch, nobody):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray would try for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(UserError, match=f"{nobody}: no Ray cluster answers"):
        cluster.connect()


def test_a_temporary_directory_that_is_too_long_for_sockets_is_said(places, monkeypatch):
    session = len(
        f"/ser_ray-{os.getuid()}/ray/session_2026-11-27_17-46-25_123456_{os.getpid()}/sockets/{cluster.LONGEST_SOCKET}"
    )
    monkeypatch.setenv("RAY_TMPDIR", "/" + "é" * ((107 - session - 1) // 2) + "x" * ((107 - session - 1) % 2))
    cluster._check_sockets_fit()
    monkeypatch.setenv("RAY_TMPDIR", os.environ["RAY_TMPDIR"] + "y")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("nothing is started"))
    with pytest.raises(UserError, match=r"y: too long by 1 bytes .*set RAY_TMPDIR, or TMPDIR, to a shorter"):
        cluster.connect()


def test_no_socket_of_ray_has_a_longer_name():
    """By Ray's own check of a path, and the names that it has here."""
    heads = [path.read_text() for path in Path(ray.__file__).parent.glob("dashboard/modules/*/*_head.py")]
    names = [f"dash_{name}" for text in heads for name in re.findall(r"class (\w+)\(SubprocessModule\)", text)]
    assert cluster.LONGEST_SOCKET in names
    assert max(map(len, [*names, "plasma_store.1", "raylet.1"])) == len(cluster.LONGEST_SOCKET)
    validate_socket_filepath("x" * cluster.SOCKET_BYTES)
    with pytest.raises(OSError, match="cannot exceed"):
        validate_socket_filepath("x" * (cluster.SOCKET_BYTES + 1))


def test_a_disk_that_cannot_be_used_is_told_from_other_errors():
    full = OSError(errno.ENOSPC, "No space left on device", "/results")
    assert isinstance(failures.user_error(full), StorageError)
    failed = RuntimeError("a worker failed")
    failed.__cause__ = full
    assert "/results: No space left on device" in str(failures.user_error(failed))
    assert failures.user_error(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert failures.user_error(TimeoutError(errno.ETIMEDOUT, "a socket")) is None
    assert isinstance(failures.user_error(OSError(errno.ETIMEDOUT, "timed out", "/nfs/x")), StorageError)


@pytest.mark.parametrize("ctrl_c", [signal.SIG_IGN, signal.default_int_handler], ids=["background", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_in_a_background_too(ctrl_c, number):
    """A script's background job starts with SIGINT ignored; what is sent to it by name counts all the same."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, number)}
    try:
        signal.signal(signal.SIGINT, ctrl_c)
        cluster._install_signal_handlers()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.ray
def test_the_workers_of_a_trainer_that_wait_are_counted(full_cluster):
    """Ray Train requests them as one placement group; that of a trial's own process has one bundle."""
    before = cluster.trainers_waiting(2)
    groups = [ray.util.placement_group([{"CPU": 1}] * count) for count in (1, 2, 2)]
    assert cluster.trainers_waiting(2) == before + 2
    for group in groups:
        ray.util.remove_placement_group(group)
    assert cluster.trainers_waiting(2) == before


@pytest.mark.ray
def test_processes_of_ours_look_for_garbage_less_often_and_a_users_own_process_as_before(ray_cluster):
    @ray.remote(num_cpus=0)
    def threshold() -> int:
        import ser_ray.runtime  # noqa: F401

        return gc.get_threshold()[0]

    assert ray.get(threshold.remote()) == 10_000
    assert gc.get_threshold()[0] < 10_000
