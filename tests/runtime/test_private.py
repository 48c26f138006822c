"""A Ray of one's own on a machine that others use too: what listens, and whose the files are."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import ray_constants

from ser_ray.runtime import private
from ser_ray.schema import UserError


@pytest.mark.ray
def test_every_port_of_a_ray_of_ours_is_on_loopback(ray_cluster):
    """Ray's own processes, a worker that it started, and this one."""

    @ray.remote(num_cpus=0)
    def worker() -> int:
        return os.getpid()

    ours = {os.getpid(), ray.get(worker.remote())}
    session = ray._private.worker._global_node.get_session_dir_path()
    for process in psutil.Process().children(recursive=True):
        ours.add(process.pid)
    for process in psutil.process_iter(["pid", "cmdline"]):
        if session in " ".join(process.info["cmdline"] or ()):
            ours.add(process.pid)
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    assert len(listening) >= 5, "the GCS, the raylet, the dashboard, its agent, a worker"
    elsewhere = [c for c in listening if not re.fullmatch(r"127\.0\.0\.1|::1|::ffff:127\.0\.0\.1", c.laddr.ip)]
    assert elsewhere == []


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
