"""A table of the recordings in a folder, to check and to train on: ``ser-ray table DIR > mine.csv``.

Emotion and speaker are read from a ``--pattern`` of the names, or guessed from folders and names. The table goes to the
standard output; what was found, and what could not be known, to the terminal.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["table", *sys.argv[1:]]))

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ser_ray.config.words import emotion_of
from ser_ray.corpora.files import audio_files
from ser_ray.corpora.guess import FIELDS, Guess, by_looks, by_pattern, word_counts
from ser_ray.corpora.rows import COLUMNS
from ser_ray.schema import EMOTIONS, UserError, first_few
from ser_ray.terminal import PlainConsole

SHOWN: Final = 20
"""Maximum number of words in a list."""
PLACE_SHOWN: Final = 8
"""The same for a place of the names: these tell what it holds."""


def main(directory: Path, pattern: str | None = None) -> int:
    """``ser-ray table``. Raises UserError for a folder without recordings, or a pattern that fits none of them."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    console = PlainConsole(stderr=True)
    found, unreadable = _recordings(directory)
    guess = by_pattern(found, pattern) if pattern else by_looks(found)
    if not guess.rows:
        raise UserError(f"--pattern {pattern!r} fits none of {len(found)} recordings, such as {guess.unmatched[0]}")
    columns = [column for column in COLUMNS if any(column in row for row in guess.rows)]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for row in guess.rows:
        writer.writerow(dict(row) | {"path": os.path.join(directory, row["path"])})  # noqa: PTH118  (as it was given)
    for line in (*_lines(guess), *unreadable):
        console.print(line)
    return 0


# -- below: how it is done


def _recordings(directory: Path) -> tuple[list[Path], list[str]]:
    """The recordings below a folder, and a line about those whose names are not UTF-8, as a table is."""
    found, left = [], 0
    for path in audio_files(directory):
        try:
            str(path).encode()
            found.append(path)
        except UnicodeEncodeError:
            left += 1
    if not found:
        raise UserError(f"{directory}: no recordings in it")
    return found, [f"left out: {left} recordings with names that are not UTF-8; rename them"] if left else []


def _lines(guess: Guess) -> Iterator[str]:
    """What was found, by field, with counts; and what could not be known."""
    yield f"{len(guess.rows)} recordings"
    yield from _emotions(guess)
    yield _speakers(guess)
    for field, origin in guess.origins.items():
        if field not in ("speaker", "emotion"):
            yield f"{field}: {len(word_counts(guess.rows, field))} different, from {origin}"
    if guess.unmatched:
        examples = ", ".join(guess.unmatched[:3])
        yield f"left out: {len(guess.unmatched)} recordings that do not fit the pattern, such as {examples}"
    if unknown := [field for field in ("emotion", "speaker") if field not in guess.origins]:
        yield from _places(guess, unknown)
        return
    yield (
        "check these before training, and keep the table where you ran this: its paths begin with the folder as you "
        "gave it. Then: ser-ray new mine > mine.yaml"
    )


def _emotions(guess: Guess) -> Iterator[str]:
    if "emotion" not in guess.origins:
        yield "emotion: not known: no folder and no part of the names has words for emotions"
        return
    counts = word_counts(guess.rows, "emotion")
    words = first_few([_meaning(word, n) for word, n in counts.most_common()], SHOWN)
    yield f"emotion, from {guess.origins['emotion']}: {words}"
    emotions = sorted({emotion_of(word) for word in counts if word})
    if others := [emotion for emotion in emotions if emotion not in EMOTIONS]:
        yield (
            f"not among the emotions of the default: {first_few(others, SHOWN)}. To train on them write emotions: "
            f"[{first_few(emotions, SHOWN)}] in the section experiment of the search space"
        )


def _meaning(word: str, n: int) -> str:
    emotion = emotion_of(word)
    if not word:
        return f"(nothing) {n}: left out"
    return f"{word} {n}" + (f" (counts as {emotion})" if emotion != word else "")


def _speakers(guess: Guess) -> str:
    if "speaker" not in guess.origins:
        return "speaker: not known; splits are then by recording, and stamped LEAKY"
    counts = word_counts(guess.rows, "speaker")
    words = first_few([f"{word} {n}" for word, n in sorted(counts.items())], SHOWN)
    return f"speaker, from {guess.origins['speaker']}: {len(counts)} of them: {words}"


def _places(guess: Guess, unknown: Sequence[str]) -> Iterator[str]:
    """How to say where the fields are that are not known: the words of every place in folders and names."""
    fields = " and ".join(f"{{{field}}}" for field in unknown)
    if not guess.places:  # a pattern was given, and names no speaker
        yield f"add {fields} to the pattern, or fill the column"
        return
    yield f"folders and names have, where {guess.rows[0]['path']} is {guess.skeleton}:"
    for number, counts in guess.places.items():
        words = [word for word, _ in counts.most_common()]
        yield f"  {{{number}}}: {len(words)} different: {first_few(words, PLACE_SHOWN)}"
    yield (
        f"run this again with {' and '.join(f'{{{field}}}' for field in FIELDS[:2])} in place of their numbers: "
        f"--pattern '{guess.skeleton}'; or fill the column"
    )
