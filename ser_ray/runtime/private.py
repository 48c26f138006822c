"""A Ray of one's own on a machine that others use too: its ports on loopback, its files and its token for its owner.

Whoever can talk to a Ray, or write where it keeps its sockets, can run code as its owner.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ray._private import ray_constants

from ser_ray.schema import UserError


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """While this holds, a Ray that is started has all its ports on 127.0.0.1.

    Ray does so by itself on macOS and Windows, where it has no clusters; elsewhere it uses the machine's address, also
    where it is given that of loopback (``ray._private.services.get_node_ip_address``).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def serve_on_loopback() -> None:
    """In a replica of Ray Serve, before it is ready: its port is on 127.0.0.1 too. Ray 2.60 opens it on all addresses
    (``ray.serve._private.replica``)."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def own_directory(temp: Path) -> Path:
    """Where a Ray that is started keeps its sessions: below ``temp``, in a directory that only its owner can enter. Ray
    itself makes its directories writable for everybody.

    Raises UserError if that directory is there already, and is another's.
    """
    own = temp / f"ser_ray-{os.getuid()}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{own}: belongs to another user; set RAY_TMPDIR to a directory of your own")
    own.chmod(0o700)
    return own / "ray"


def guard_token() -> None:
    """Make Ray's token readable by its owner alone, and make one where there is none: Ray's own is readable by all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file():
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            with contextlib.suppress(OSError):  # such as one that is mounted read-only: its mode is not ours to set
                path.chmod(0o600)
        return
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:  # another process was first, or the home directory cannot be written: Ray says so
        return
    with open(file, "w", encoding="utf-8") as token:  # noqa: PTH123 (a descriptor)
        token.write(secrets.token_hex(32))
