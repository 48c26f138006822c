"""A process that decodes recordings of strangers, and nothing else: one that takes too long, or breaks on what it is
given, is ended without harm to the server. `decoding` starts it; it ends with its standard input.

Request: a line of JSON (``bytes``, ``audio``: the settings of `config.Audio`), then the recording. Answer: a line of
JSON with the pieces, then the samples of all of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from ser_ray.config import Audio
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech.pieces import Piece, pieces_of

MEMORY: Final = 4 * 2**30
"""Bytes that the process may map: decoders of hostile files ask for more than there is."""
TOO_LONG: Final = "too long"


def main() -> None:
    """Answer requests of standard input until it ends."""
    _limit_memory()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _answer(answers, [])  # it is ready
    while line := requests.readline():
        request = json.loads(line)
        with tempfile.TemporaryFile() as file:  # which has no name, and so is gone with this process
            file.write(requests.read(request["bytes"]))
            file.flush()
            path = Path(f"/dev/fd/{file.fileno()}")
            pieces = pieces_of(Audio.model_validate(request["audio"]), [path])
            _answer(answers, list(_within(pieces, request["seconds"])))


# -- below: how it is done


def _within(pieces: Iterator[Piece], seconds: float) -> Iterator[Piece]:
    """The pieces, as long as they are not more than so many seconds."""
    left = seconds * SAMPLING_RATE
    for piece in pieces:
        left -= 0 if piece.samples is None else len(piece.samples)
        if left < 0:
            yield replace(piece, samples=None, reason=TOO_LONG)
            return
        yield replace(piece, path="")


def _answer(file: BinaryIO, pieces: list[Piece]) -> None:
    about = [[None if p.samples is None else len(p.samples), p.reason, p.start, p.end, p.number, p.of] for p in pieces]
    file.write(json.dumps(about).encode() + b"\n")
    for piece in pieces:
        if piece.samples is not None:
            file.write(piece.samples.tobytes())
    file.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without it: the time is limited all the same
        return


if __name__ == "__main__":
    main()
