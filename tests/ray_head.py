"""A Ray head node of its own on loopback, as ``ray start`` makes one: a process with a token, ended by its id."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Head:
    """What another process needs to use it."""

    environment: dict[str, str]
    """With the token, without an address."""
    address: str
    dashboard: str


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_head(home: Path, *, gpus: int = 0, jobs: bool = False) -> Iterator[Head]:
    """Three CPUs, two for trials and one for data, and ``gpus`` that are declared whether or not they are there.

    ``jobs``: whether it takes submitted jobs; its dashboard, which does, needs some seconds.
    """
    token = home / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    port, dashboard = _free_port(), _free_port()
    temporary = Path(f"/tmp/ser_ray_{os.getpid()}_{port}")  # short: Ray's sockets live below it
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    # On two cores Ray takes the small processes of nested trials for a leak, and says so in the job's log.
    environment["RAY_worker_maximum_startup_concurrency"] = "8"
    environment["RAY_prestart_worker_first_driver"] = "0"  # as a Ray of this project
    # Ports of its own, so that other clusters on this machine do not matter.
    command = [
        *RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=3", f"--num-gpus={gpus}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}",
        f"--ray-client-server-port={_free_port()}", f"--dashboard-agent-listen-port={_free_port()}", "--block",
        f"--include-dashboard={jobs}",
    ]  # fmt: skip
    log = home / "head.log"
    with log.open("w") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        try:
            for _ in range(120):
                assert process.poll() is None, log.read_text()
                if "Ray runtime started" in log.read_text():
                    break
                time.sleep(0.5)
            yield Head(environment, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        finally:
            # Ray's own end of a head waits half a minute for processes that are idle.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(60)
            shutil.rmtree(temporary, ignore_errors=True)
