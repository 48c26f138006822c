"""Write files atomically: a reader, or a run after a kill, finds the old file, the new one, or none, never a part."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE})
"""Errors of a disk that is full, read-only, not ours, or broken."""
IMPOSSIBLE: Final = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.ENXIO})
"""Errors of a path that no file can have, or that something else has: too long, links that circle."""
UNREACHABLE: Final = frozenset({errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT})
"""Errors of a disk on another machine; only if they name a file, as sockets raise the same."""

PLACES: Final[dict[str, str]] = {"TMPDIR": tempfile.gettempdir()}
"""What is to be set for the files below a path: of this process, as each works on one search."""


def explain(error: OSError, where: object = "") -> str | None:
    """A human-readable line about a disk that cannot be used; None for errors of another kind.

    ``where``: the path, if the error does not contain it.

    >>> explain(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    '/data/x: No space left on device; make room or choose another path, then run the same command again'
    >>> explain(OSError(errno.EACCES, "Permission denied", "/data/x"))
    '/data/x: Permission denied; have it made accessible or choose another path, then run the same command again'
    """
    if error.filename and error.errno in IMPOSSIBLE:
        return f"{error.filename}: {os.strerror(error.errno)}; give another path"
    if error.errno not in UNWRITABLE and not (error.filename and error.errno in UNREACHABLE):
        return None
    assert error.errno is not None
    place = error.filename or where
    prefix = f"{place}: " if place else ""
    key = _place_of(str(place))
    remedy = {errno.EACCES: "have it made accessible", errno.EROFS: "have it made writable"}.get(
        error.errno, "make room"
    )
    other = f"set {key} to another path" if key else "choose another path"
    # The system's own text: libraries word it differently.
    return f"{prefix}{os.strerror(error.errno)}; {remedy} or {other}, then run the same command again"


def name_place(key: str, path: str) -> None:
    """Let `explain` name the key of the configuration that leads to what is below ``path``."""
    PLACES[key] = path


def expanded(path: str | Path) -> Path:
    """A path with ``~`` as a home; that of nobody stays, where `Path.expanduser` raises RuntimeError."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def resolved(path: str | Path) -> Path:
    """The absolute path of what a user named, without ``~`` and links. It may be anything: links that circle, the home
    of nobody and a null byte stay as they are.

    >>> resolved("/dev/../tmp/.")
    PosixPath('/tmp')
    """
    path = expanded(path)
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # a null byte
        return path.absolute()


def readable(name: str | Path) -> str:
    """A name as text. In a file system names are bytes: those that are not UTF-8 are shown as numbers.

    >>> readable(os.fsdecode(b"caf\\xe9.wav"))
    'caf\\\\xe9.wav'
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end, and only after success, it replaces ``path``.

    Two writers of the same content do no harm. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}")  # within the 255 bytes of a name
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # libraries do not say where
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    with replacing(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object) -> None:
    """`write_text` of indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool | None]:
    """Hold a lock between processes that ends with its holder, even a killed one; yields whether it was acquired.

    ``shared``: hold it together with others who share it. Without ``wait``, False at once if another process holds it.
    None on a file system without locks: a caller that needs exclusion must then do nothing, and one that only avoids
    duplicate work proceeds.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                yield False if error.errno == errno.EWOULDBLOCK else None
                return
            if _is_at(path, file.fileno()):
                yield True
                return
            # The file was removed during the wait: a lock on it excludes nobody.


def _place_of(path: str) -> str | None:
    """The key of the innermost place that a path is below."""
    holding = [key for key, folder in PLACES.items() if path.startswith(f"{folder.rstrip('/')}/")]
    return max(holding, key=lambda key: len(PLACES[key]), default=None)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
