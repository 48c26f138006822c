"""Hosts on one machine: network namespaces on a bridge, each with an address of its own. Needs root and iproute2.

Their names, and what runs on them (ports, job numbers, directories of Ray), are the machine's: of two test runs at
once, one waits for the other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NET = "10.77.3"
"""Of the bridge, which this process's namespace is on as .254; the hosts are .1, .2, ..."""
BRIDGE = "sr-br"
INSIDE = "sr-0"
"""The interface of every host."""


def unavailable_reason() -> str | None:
    """What is missing for it; None where it can run."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip is not installed (apt install iproute2)"
    name = f"sr-p{os.getpid()}"
    probe = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "link", "del", name], check=True)
    return None


def name(number: int) -> str:
    """The namespace of a host."""
    return f"sr-n{number}"


def address(number: int) -> str:
    """Its address."""
    return f"{NET}.{number}"


def inside(number: int, *command: str) -> list[str]:
    """The command that runs ``command`` on a host."""
    return ["ip", "netns", "exec", name(number), *command]


@contextmanager
def hosts(count: int) -> Iterator[None]:
    """So many, while the body runs; waits while another process has some."""
    with (Path(tempfile.gettempdir()) / "ser_ray-test-hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _clear()  # what a run that was killed has left
        try:
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "addr", "add", f"{NET}.254/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            for number in range(1, count + 1):
                _add(number)
            yield
        finally:
            _clear()


def _add(number: int) -> None:
    outer = f"sr-v{number}"
    _run("ip", "netns", "add", name(number))
    _run("ip", "link", "add", outer, "type", "veth", "peer", "name", INSIDE, "netns", name(number))
    _run("ip", "link", "set", outer, "master", BRIDGE, "up")
    _run(*inside(number, "ip", "addr", "add", f"{address(number)}/24", "dev", INSIDE))
    _run(*inside(number, "ip", "link", "set", INSIDE, "up"))
    _run(*inside(number, "ip", "link", "set", "lo", "up"))


def pids(number: int) -> list[int]:
    """The processes on a host."""
    listed = subprocess.run(["ip", "netns", "pids", name(number)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def _clear() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for number in range(1, 10):
        if name(number) not in listed:
            continue
        for pid in pids(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The cable first: a namespace goes when the last process in it has, which takes it a moment.
        subprocess.run(["ip", "link", "del", f"sr-v{number}"], capture_output=True)
        subprocess.run(["ip", "netns", "del", name(number)], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
