"""What is behind an error that Ray raises when a process of ours failed."""

from __future__ import annotations

import re

from ray.exceptions import RayError

from ser_ray import disk
from ser_ray.schema import MemoryShortageError, ProcessDiedError, StorageError, UserError

_DIED = re.compile(
    r"The (actor|worker) died unexpectedly|The actor is dead|The actor \w+ is unavailable"
    r"|the node it was running on is dead|local raylet died"
)
"""Messages of Ray 2.60 about a process that was killed from outside."""


def user_error(error: BaseException, where: object = "") -> UserError | None:
    """The UserError behind an error that Ray raises for a failed process of ours; None if there is none.

    It is a StorageError if the process could not write its files (``where`` they are, if the error does not say it),
    and a ProcessDiedError if it was killed from outside.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            kinds = (StorageError, MemoryShortageError, ProcessDiedError, UserError)
            return next(kind for kind in kinds if isinstance(cause, kind))(str(cause).splitlines()[-1])
        if isinstance(cause, OSError) and (line := disk.explain(cause, where)):
            return StorageError(line)
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(error, RayError) and (line := death(f"{type(error).__module__}.{type(error).__name__}: {error}")):
        return ProcessDiedError(line)
    return None


def death(text: str) -> str | None:
    """A human-readable line if Ray's ``text`` says that a process was killed from outside, else None."""
    if any(words in text for words in ("running low on memory", "ray.exceptions.OutOfMemoryError")):
        return (
            "Ray killed its process because the machine's memory was nearly full; lower tune.concurrency or "
            "experiment.batch_seconds, or use a machine with more memory"
        )
    return "its process died" if _DIED.search(text) else None
