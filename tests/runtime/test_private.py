"""A Ray of one's own on a machine that others use too: what listens, and whose the files are."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from ray._private import ray_constants
from ray.train.torch import TorchTrainer

from ser_ray.runtime import cluster, private
from ser_ray.runtime.rendezvous import ByFile
from ser_ray.schema import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPBACK = re.compile(r"127\.0\.0\.1|::1|::ffff:127\.0\.0\.1")
ROLES = {
    "gcs_server": "gcs_server",
    "raylet": "raylet/raylet",
    "monitor": "monitor.py",
    "dashboard": "dashboard/dashboard.py",
    "ray::DashboardAgent": "ray::DashboardAgent",
    "ray::RuntimeEnvAgent": "ray::RuntimeEnvAgent",
    "worker": "ray::",
}
"""A process of SECURITY.md's table -> what its command line has; the first that fits."""
METHODS = (
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
)
"""One method of each of Ray's gRPC services."""

Listener = tuple[str, str, str]
"""Process, what it speaks, what it asks for."""


def listening() -> list[tuple[str, str, int]]:
    """Process, address and port of all that listens in the Ray of this process."""
    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    of_pid = {child.pid: child for child in psutil.Process().children(recursive=True)}
    of_pid |= {p.pid: p for p in psutil.process_iter(["cmdline"]) if session in " ".join(p.info["cmdline"] or ())}
    for pid, process in (of_pid | {os.getpid(): psutil.Process()}).items():
        command = " ".join(process.cmdline())
        role = "driver" if pid == os.getpid() else next((r for r, part in ROLES.items() if part in command), command)
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.append((role, connection.laddr.ip, connection.laddr.port))
    return found


def asked_without_a_token(port: int) -> tuple[str, str]:
    """What a port speaks and asks for, by what it answers to somebody without the token."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return "HTTP: metrics for Prometheus" if b"# HELP" in answer.read() else "HTTP", "nothing"
    except urllib.error.HTTPError as refused:
        return "HTTP", "the token" if refused.code == 401 else f"{refused.code}"
    except (http.client.HTTPException, OSError):
        pass
    answers = []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=30)
                answers.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                answers.append(error.code())
    # A server says of services that are another's that it has none.
    left = {answer for answer in answers if answer is not grpc.StatusCode.UNIMPLEMENTED}
    return "gRPC", "the token" if left == {grpc.StatusCode.UNAUTHENTICATED} else f"{left}"


def documented() -> dict[Listener, str]:
    """The rows of SECURITY.md, and the ports of each."""
    rows = re.findall(
        r"^\| `([^`]+)`[^|]*\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (REPOSITORY / "SECURITY.md").read_text(), re.M
    )
    return {(process, speaks, asks.partition(", but")[0]): ports for process, ports, speaks, asks in rows}


@pytest.mark.ray
def test_what_listens_is_what_the_security_page_lists(ray_cluster):
    """Of Ray's own processes, of a worker and of this process; on loopback, with the check that is named."""

    @ray.remote(num_cpus=0)
    class Worker:
        def pid(self) -> int:
            return os.getpid()

    worker = Worker.remote()
    ray.get(worker.pid.remote())
    found = listening()
    assert [one for one in found if not LOOPBACK.fullmatch(one[1])] == []
    rows = documented()
    observed = {(role, *asked_without_a_token(port)) for role, _, port in found}
    assert observed - rows.keys() == set()
    by_chance = {row for row, ports in rows.items() if "where it is free" in ports}
    assert rows.keys() - observed - by_chance == set()


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_a_trial_meet_without_a_port_for_everybody(ray_cluster, tmp_path):
    def work() -> None:
        value = torch.ones(1) * (dist.get_rank() + 1)
        dist.all_reduce(value)
        ports = psutil.Process().net_connections("tcp")
        addresses = [port.laddr.ip for port in ports if port.status == psutil.CONN_LISTEN]
        (tmp_path / f"{dist.get_rank()}.json").write_text(json.dumps([value.item(), addresses]))

    assert cluster.is_own()
    TorchTrainer(
        work,
        torch_config=ByFile(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "runs")),
    ).fit()
    for rank in (0, 1):
        total, addresses = json.loads((tmp_path / f"{rank}.json").read_text())
        assert total == 3
        assert addresses
        assert all(LOOPBACK.fullmatch(address) for address in addresses), addresses


@pytest.mark.ray
def test_the_sessions_of_a_ray_of_ours_are_for_its_owner(ray_cluster):
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    guard = next(parent for parent in session.parents if parent.name == f"ser_ray-{os.getuid()}")
    assert guard.stat().st_mode & 0o777 == 0o700


def test_a_cluster_is_joined_at_its_own_address():
    before = ray_constants.ENABLE_RAY_CLUSTER
    with pytest.raises(KeyError), private.on_loopback():
        raise KeyError
    assert before == ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.parametrize("there", ["nothing", "open", "link", "another's"])
def test_sessions_lie_where_only_their_owner_can_enter(tmp_path, monkeypatch, there):
    own = tmp_path / f"ser_ray-{os.getuid()}"
    if there == "open":
        own.mkdir(mode=0o777)
        own.chmod(0o777)
    elif there == "link":
        (tmp_path / "elsewhere").mkdir()
        own.symlink_to(tmp_path / "elsewhere")
    elif there == "another's":
        own.mkdir()
        owner = own.stat().st_uid
        own = own.rename(tmp_path / f"ser_ray-{owner + 1}")
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    if there in ("link", "another's"):
        with pytest.raises(UserError, match=f"{own}: belongs to another user; set RAY_TMPDIR"):
            private.own_directory(tmp_path)
        return
    assert private.own_directory(tmp_path) == own / "ray"
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("by_variable", [False, True], ids=["home", "RAY_AUTH_TOKEN_PATH"])
@pytest.mark.parametrize("made", [False, True], ids=["new", "made by Ray"])
def test_the_token_is_for_its_owner_whoever_made_it(tmp_path, monkeypatch, made, by_variable):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    if by_variable:
        path = tmp_path / "token"
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if made:
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret")
        path.chmod(0o644)
    private.guard_token()
    assert path.stat().st_mode & 0o777 == 0o600
    token = path.read_text()
    assert token == "secret" if made else re.fullmatch("[0-9a-f]{64}", token)
    private.guard_token()
    assert path.read_text() == token


def test_a_token_that_is_in_the_environment_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    private.guard_token()
    assert list(tmp_path.iterdir()) == []
