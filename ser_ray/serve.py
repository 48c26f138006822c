"""Serve one or more checkpoints over HTTP, on Ray Serve.

    python -m ser_ray.serve CHECKPOINT... [--host 127.0.0.1] [--port 8000] [--replicas auto] [--key-file FILE]
    python -m ser_ray.serve CHECKPOINT... --config > serve.yaml      # for `serve deploy` on a cluster

CHECKPOINT is a directory such as results/demo/best. It listens on this machine alone; any other address needs a file
of keys. Nothing of a request is kept or logged but its size and time. It runs until Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["serve", *sys.argv[1:]]))

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ser_ray.disk import resolved
from ser_ray.schema import UserError
from ser_ray.serving import keys
from ser_ray.serving.checkpoints import named
from ser_ray.serving.limits import read_limits
from ser_ray.serving.settings import Settings
from ser_ray.terminal import PlainConsole

LOOK_S = 1.0
"""Seconds between two looks whether Ray is still there, while the server ends."""
APPLICATION = "ser_ray.serving.deployment:application"
START_S = "120"
"""Seconds that the process which listens has to start. Ray Serve ends it after 5, which on a machine with other work is
too little for Python to import what it needs."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray Serve's logs: no line for a request."""


def main(
    checkpoints: list[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: str = "auto",
    key_file: Path | None = None,
    config: bool = False,
    limits: Sequence[str] = (),
) -> int:
    """``ser-ray serve``: answer until Ctrl-C, or with ``config`` print a configuration file of Ray Serve."""
    keys.read_keys(key_file, host)
    settings = Settings(
        checkpoints=named(checkpoints),
        host=host,
        key_file=str(resolved(key_file)) if key_file else None,
        replicas=_replicas(replicas),
        limits=read_limits(limits),
    )
    if config:
        print(configuration(settings, port))
        return 0
    _check_free(host, port)
    run(settings, port, PlainConsole())
    return 0


def configuration(settings: Settings, port: int) -> str:
    """A configuration file for ``serve deploy``: YAML, whose values are JSON."""
    http = {"host": settings.host, "port": port}
    arguments = "\n".join(f"      {name}: {json.dumps(value)}" for name, value in settings.model_dump().items())
    return (
        f"# {' '.join(settings.checkpoints)}, for `serve deploy`; every node has to see these paths.\n"
        "proxy_location: EveryNode\n"
        f"http_options: {json.dumps(http)}\n"
        f"logging_config: {json.dumps(QUIET)}\n"
        "applications:\n"
        "  - name: ser-ray\n"
        "    route_prefix: /\n"
        f"    import_path: {APPLICATION}\n"
        "    args:\n"
        f"{arguments}"
    )


def run(settings: Settings, port: int, console: PlainConsole) -> None:
    """Start Ray, and serve until Ctrl-C. Raises UserError where the first model cannot be loaded."""
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", START_S)  # read by Ray's processes at their start
    from ray import serve

    from ser_ray.runtime import cluster
    from ser_ray.serving.deployment import NAME, application

    cluster.connect()
    if cluster.VERBOSE not in os.environ:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not cluster.is_own():
        raise UserError(
            "a Ray cluster is up here, for all its users; serve on it by ser-ray serve ... --config > serve.yaml and "
            "serve deploy serve.yaml"
        )
    http = {"host": settings.host, "port": port}
    try:
        with contextlib.suppress(TimeoutError):  # after a minute, too soon for a busy machine; run waits once more
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config=QUIET)
        serve.run(application(settings), name=NAME, route_prefix="/", logging_config=QUIET)
        _announce(settings, port, console)
        with contextlib.suppress(KeyboardInterrupt):  # how a server ends
            threading.Event().wait()
    except RuntimeError:
        raise UserError(_problem(serve.status())) from None
    except TimeoutError:
        raise UserError("the server did not start in time: the machine has too much to do") from None
    finally:
        _end(NAME)


# -- below: how it is done


def _replicas(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"--replicas {given}: give a number from 1, or auto for as many as the load asks for")
    return int(given)


def _check_free(host: str, port: int) -> None:
    """Raises UserError where the server cannot listen."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another one") from None


def _end(name: str) -> None:
    """Take the application down, then Ray: requests under way get their answers.

    A signal to all processes at once, as `timeout` and systemd send it, ends Ray's own at the same moment. Its calls
    would wait a minute for them, so this process ends then without.
    """
    import ray
    from ray import serve

    from ser_ray.runtime import cluster

    ending = threading.Thread(target=serve.delete, args=(name,), daemon=True)
    time.sleep(LOOK_S)  # a call to a Ray that is about to go would fail, and Ray would print that
    if cluster.is_up():
        ending.start()
    while ending.is_alive() and cluster.is_up():
        ending.join(LOOK_S)
    if cluster.is_up():
        ray.shutdown()
    elif sys.exc_info()[0] is None:
        sys.stdout.flush()
        os._exit(0)


def _problem(status: Any) -> str:
    """Why the application did not start, in one line: what a replica said last."""
    from ser_ray.serving.deployment import NAME

    found = status.applications[NAME]
    said = [deployment.message for deployment in found.deployments.values()] + [found.message]
    lines = [line.strip() for message in said for line in message.splitlines()]
    ours = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    return (ours or [line for line in lines if line] or ["the server did not start; --verbose shows Ray's own logs"])[
        -1
    ]


def _announce(settings: Settings, port: int, console: PlainConsole) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    console.print(f"http://{host}:{port} answers with {', '.join(settings.checkpoints)}; Ctrl-C ends it")
    if settings.key_file:
        console.print(f"a key of {settings.key_file} is needed; the connection is not encrypted: put TLS before it")
    else:
        console.print("only this machine reaches it, and no key is needed")
