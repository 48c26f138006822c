"""The embedded demo as a submitted job on a cluster that ``ray start`` made: what the README promises, whole."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path):
    """A head node of its own on loopback, with token authentication; yields environment and dashboard address."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    temporary = Path(f"/tmp/ser_ray_{os.getpid()}")  # short: Ray's sockets live below it
    dashboard = free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    # A job's "python" is the head's.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(tmp_path)}
    # On two cores Ray takes the small processes of nested trials for a leak, and says so in the job's log.
    environment["RAY_worker_maximum_startup_concurrency"] = "8"
    # Ports of its own, so that other clusters on this machine do not matter.
    command = [
        *RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=3",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}", "--block",
    ]  # fmt: skip
    with (
        (tmp_path / "head.log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield environment, f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()
            process.wait(60)
            shutil.rmtree(temporary, ignore_errors=True)


def submit(environment: dict[str, str], address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RAY, "job", "submit", f"--address={address}", "--working-dir=.", "--", "python", "-m", "ser_ray.tune"]
    for _ in range(30):
        done = subprocess.run(
            [*command, *arguments],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        if "No available agent" not in done.stderr:  # the dashboard answers before the node's agent is there
            break
        time.sleep(2)
    return done


def wait_for(environment: dict[str, str], address: str) -> None:
    for _ in range(60):
        listed = subprocess.run(
            [*RAY, "job", "list", f"--address={address}"], env=environment, capture_output=True, check=False
        )
        if listed.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(listed.stderr.decode())


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_runs_as_a_submitted_job(head, tmp_path):
    environment, address = head
    wait_for(environment, address)
    done = submit(environment, address, f"storage.cache={tmp_path / 'cache'}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = tmp_path / "ser_ray" / "results" / "demo"
    assert str(results) in done.stdout, "the job says where its results go"
    rows = list(csv.DictReader((results / "trials.csv").open()))
    assert len(rows) >= 6
    assert {row["backbone"] for row in rows} == {"embedded/tiny-whisper", "embedded/tiny-wav2vec2"}
    assert "method: qlora" in (results / "best" / "experiment.yaml").read_text()
    test = json.loads((results / "evaluation" / "test.json").read_text())
    assert test["uar"] > 0.65
    assert (results / "report.html").is_file()
    _, said = done.stdout.split("Running entrypoint")  # what comes before is the job command's own
    for internal in ("(raylet", "(TrainController", "WARNING", "Traceback", "INFO "):
        assert internal not in said, internal

    refused = submit(environment, address, "storage.results=results")
    assert refused.returncode != 0
    assert "relative" in refused.stdout + refused.stderr

    stranger = {key: value for key, value in environment.items() if not key.startswith("RAY_AUTH")}
    assert submit(stranger, address).returncode != 0, "a job without the token is refused"
