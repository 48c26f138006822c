"""A server for benchmarks: `ser-ray serve` as a process of its own, its processes, and what they hold."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PARTS = {"ServeReplica:ser-ray:Models": "model", "ServeReplica:ser-ray:Front": "front", "ProxyActor": "proxy"}
"""What a process of a server has in its command line -> what it is called in a table."""


@dataclass(frozen=True)
class Server:
    """Where it is, and its process."""

    port: int
    process: psutil.Process

    def megabytes(self) -> dict[str, float]:
        """What each part holds of its own (USS), decoders too."""
        found: dict[str, float] = {}
        for child in self.process.children(recursive=True):
            try:
                command = " ".join(child.cmdline())
                name = next((name for part, name in PARTS.items() if part in command), "")
                name = "decoders" if "serving.decoder" in command else name
                if name:
                    found[name] = found.get(name, 0) + child.memory_full_info().uss / 1e6
            except psutil.NoSuchProcess:
                continue
        return found

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def recordings_of(folder: Path, count: int) -> list[Path]:
    """So many recordings of a folder, evenly over its files."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac"))
    return paths[:: max(1, len(paths) // count)][:count]


@contextmanager
def serving(program: Sequence[str]) -> Iterator[Server]:
    """Start a server by the command line ``program``, to which the port is added, and end it; its lines are seen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([*program, "--port", str(port)], env=environment, stdout=sys.stderr)
    server = Server(port, psutil.Process(process.pid))
    try:
        _wait(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
    if code:
        raise SystemExit(f"the server ended with {code}")


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if server.ask("GET", "/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server did not start")
