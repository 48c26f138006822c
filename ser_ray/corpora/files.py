"""Find a corpus's audio files and turn their names into utterances: what all corpora share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ser_ray.disk import readable
from ser_ray.schema import Rejected, UserError, Utterance
from ser_ray.speech.formats import SUFFIXES
from ser_ray.speech.long import STDIN

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


def find_audio(inputs: Sequence[Path]) -> list[Path]:
    """Named files as they are, and in place of a folder all recordings in it, to any depth.

    A path that does not exist and a folder without recordings stay, for an answer that says so. Raises UserError if
    there is nothing else.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in inputs:
        is_folder = os.path.isdir(path)  # noqa: PTH112  (false, not an error, for an impossible name)
        # Nobody writes into a pipe that lies in a folder: reading it would not end.
        inside = [file for name in audio_files(path) if not (file := path / name).is_fifo()] if is_folder else []
        files += inside or [path]
        if is_folder and not inside:
            problems.append(f"{readable(path)}: no audio in this folder (looked for {', '.join(SUFFIXES)})")
        elif not is_folder and path != STDIN and not os.path.exists(path):  # noqa: PTH110
            problems.append(f"{readable(path)}: no such file or folder")
    if problems and len(problems) == len(inputs):
        raise UserError("; ".join(problems))
    return files


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
