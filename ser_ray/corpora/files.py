"""Find a corpus's audio files and turn their names into utterances: what all corpora share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ser_ray.disk import readable
from ser_ray.schema import Rejected, Utterance
from ser_ray.speech.formats import SUFFIXES

FIRST: Final = (".wav", ".flac")
"""Of a recording that a corpus has in several formats, one of these is used."""


def audio_files(directory: Path) -> list[Path]:
    """All recordings below ``directory``, at any depth, relative to it and sorted: every format that can be read, or
    could be with PyAV (`formats.SUFFIXES`).

    Hidden files and folders are skipped, including the ``._`` files that macOS leaves in archives. Links to folders
    are followed, each folder once: corpora on a cluster are often links to a shared copy.
    """
    paths = []
    visited = set()
    for folder, folders, names in os.walk(directory, followlinks=True):
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in visited  # noqa: PTH118
        )
        paths += [
            (Path(folder) / name).relative_to(directory)
            for name in names
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return sorted(paths)


def from_names(directory: Path, parse: Callable[[Path], Utterance]) -> tuple[list[Utterance], list[Rejected]]:
    """Utterances of all audio files below ``directory``, sorted by id, and the rejected files.

    ``parse`` gets a path relative to ``directory`` and raises ValueError, with the reason, for a name that it cannot
    parse. Of files with the same utterance id the first is used, one of `FIRST` if there is; the others are rejected.
    """
    utterances: dict[str, Utterance] = {}
    rejected = []
    for path in sorted(audio_files(directory), key=lambda path: (path.suffix.lower() not in FIRST, path)):
        try:
            path.as_posix().encode()
            utterance = parse(path)
        except UnicodeEncodeError:  # tables and shards are UTF-8
            rejected.append(Rejected(readable(path), "the name is not UTF-8; rename the file"))
            continue
        except ValueError as reason:
            rejected.append(Rejected(path.as_posix(), str(reason)))
            continue
        first = utterances.setdefault(utterance.utterance_id, utterance)
        if first is not utterance:
            rejected.append(Rejected(path.as_posix(), f"the same utterance as {first.path}, which is used"))
    return sorted(utterances.values(), key=lambda utterance: utterance.utterance_id), rejected
