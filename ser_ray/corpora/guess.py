"""Emotion and speaker of recordings from their folders and names: by a pattern, or by what their words look like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ser_ray.config.words import MEANINGS, WORDS, plain
from ser_ray.corpora.rows import OPTIONAL, SPLITS
from ser_ray.schema import UserError

FIELDS: Final = ("speaker", "emotion", *OPTIONAL)
"""What a pattern can name; of other names any text is skipped."""
MOST_EMOTIONS: Final = 30
"""A place in the names with more words than this holds no emotions."""
UNDERSTOOD: Final = 0.5
"""A place holds the emotion if at least this share of its recordings have a word there that the table of words has.
Words of one language beside words of the table are then listed for ``experiment.labels``."""
SPEAKER: Final = re.compile(r"[a-z]{1,10}[-_ ]?\d{1,4}[a-z]?", re.IGNORECASE)
"""What names of speakers often look like: Actor_01, spk12, SM1, f03."""
PER_SPEAKER: Final = 2
"""Fewest recordings of a speaker, on average: a place with a word of its own in nearly every name numbers them."""
BETWEEN: Final = re.compile(r"([_\-. ]+)")
"""What separates the parts of a name."""

Slot = tuple[str, int]
"""A place in a path: ``folder``, counted from the recording upwards, or ``name``, a part of the name; from 0."""


@dataclass(frozen=True)
class Guess:
    """Recordings with what is known of each; where that is from, in words; and those that do not fit the pattern."""

    rows: tuple[Mapping[str, str], ...]
    """Path, speaker (``unknown`` where it is), emotion (empty where it is not known), and other fields of a pattern."""
    origins: Mapping[str, str]
    """Field -> where it was found."""
    unmatched: tuple[str, ...]
    skeleton: str = ""
    """A pattern of the first recording with a number for every place, such as ``{1}/{2}-{3}.*``, to name them in."""
    places: Mapping[str, Counter[str]] = field(default_factory=dict)
    """The numbers of the skeleton -> the words of all recordings at that place."""


def by_pattern(paths: Sequence[Path], pattern: str) -> Guess:
    """The fields that ``pattern`` names, such as ``{speaker}_{emotion}_{text}.wav`` or ``{emotion}/{speaker}-{}.wav``.

    A field is as short as fits, ``*`` is any text; neither crosses folders. A pattern without a folder fits the name
    alone. Case is ignored.

    >>> found = by_pattern([Path("x/anna_joy_1.WAV"), Path("x/readme.wav")], "{speaker}_{emotion}_{}.wav")
    >>> found.rows[0]["speaker"], found.rows[0]["emotion"], found.unmatched
    ('anna', 'joy', ('x/readme.wav',))

    Raises UserError for a pattern without ``{emotion}``, or with a brace that is not closed.
    """
    regexp = _compiled(pattern)
    rows, unmatched = [], []
    for path in paths:
        parts = path.parts[-1 - pattern.count("/") :]
        if match := regexp.fullmatch("/".join(parts)):
            rows.append({"path": path.as_posix(), "speaker": "unknown"} | match.groupdict())
        else:
            unmatched.append(path.as_posix())
    return Guess(tuple(rows), {field: f"{{{field}}} of the pattern" for field in regexp.groupindex}, tuple(unmatched))


def by_looks(paths: Sequence[Path]) -> Guess:
    """Emotion and speaker from the place in folders or names where the words look like such.

    >>> paths = [Path(f"{emotion}/SM{n}_{take}.wav") for emotion in ("Angry", "Sad") for n in (1, 2) for take in "ab"]
    >>> found = by_looks(paths)
    >>> sorted({row["emotion"] for row in found.rows}), sorted({row["speaker"] for row in found.rows})
    (['Angry', 'Sad'], ['SM1', 'SM2'])
    """
    places = [_places(path) for path in paths]
    slots = sorted({slot for words in places for slot in words})
    columns = {slot: [words.get(slot, "") for words in places] for slot in slots}
    emotion = _emotion_slot(columns)
    speaker = _speaker_slot({slot: words for slot, words in columns.items() if slot != emotion}, emotion is not None)
    rows = tuple(
        {
            "path": path.as_posix(),
            "speaker": (speaker and words.get(speaker)) or "unknown",
            "emotion": (emotion and words.get(emotion)) or "",
        }
        for path, words in zip(paths, places, strict=True)
    )
    found = {"emotion": emotion, "speaker": speaker}
    skeleton, numbered = _skeleton(paths[0])
    counts = {number: Counter(filter(None, columns[slot])) for number, slot in numbered.items()}
    return Guess(rows, {field: _in_words(slot) for field, slot in found.items() if slot}, (), skeleton, counts)


# -- below: how it is done


def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[^{}]*\}|\*)", pattern)
    names = [part[1:-1] for part in parts if part.startswith("{")]
    if any(sign in part for part in parts[::2] for sign in "{}"):
        raise UserError(
            f"--pattern {pattern!r}: a brace is not closed; write it as {{speaker}}_{{emotion}}_{{text}}.wav"
        )
    if "emotion" not in names:
        raise UserError(f"--pattern {pattern!r}: it has no {{emotion}}; fields are {', '.join(FIELDS)}")
    seen: set[str] = set()
    regexp = ""
    for part in parts:
        name = part[1:-1] if part.startswith("{") else ""
        if name in seen:
            regexp += f"(?P={name})"
        elif name in FIELDS:
            seen.add(name)
            regexp += f"(?P<{name}>[^/]+?)"
        else:
            regexp += r"[^/]*?" if part == "*" else r"[^/]+?" if part.startswith("{") else re.escape(part)
    return re.compile(regexp, re.IGNORECASE)


def _places(path: Path) -> dict[Slot, str]:
    """Every word of a path, by its place."""
    folders = {("folder", number): name for number, name in enumerate(reversed(path.parts[:-1]))}
    words = BETWEEN.split(path.stem)[::2]
    return folders | {("name", number): word for number, word in enumerate(words) if word}


def _is_emotion(word: str) -> bool:
    return plain(word) in WORDS or plain(word) in MEANINGS


def _emotion_slot(columns: Mapping[Slot, Sequence[str]]) -> Slot | None:
    """The place with the largest share of words for emotions, if there are several of them, and few words beside."""
    shares = {
        slot: sum(map(_is_emotion, words)) / len(words)
        for slot, words in columns.items()
        if len(set(map(plain, words))) <= MOST_EMOTIONS and len({plain(w) for w in words if _is_emotion(w)}) > 1
    }
    best = max(shares, key=lambda slot: shares[slot], default=None)
    return best if best is not None and shares[best] >= UNDERSTOOD else None


def _speaker_slot(columns: Mapping[Slot, Sequence[str]], is_emotion_known: bool) -> Slot | None:
    """A place where every recording has a word, and several share it: one that looks like the name of a speaker, a
    folder before a part of the name; else a folder. None where two could be.

    Numbers alone may count anything. They are speakers only in a folder, and if the emotion is known: where that is a
    number too, nothing tells the two from the number of a sentence.
    """
    possible = [
        slot
        for slot, words in columns.items()
        if all(words)
        and 1 < len(set(words)) <= len(words) / PER_SPEAKER
        and sum(map(_is_emotion, words)) < UNDERSTOOD * len(words)  # some people have the name Joy
        and not all(word.lower() in SPLITS for word in words)
        and (is_emotion_known or not all(word.isdecimal() for word in words))
    ]
    named = [slot for slot in possible if all(SPEAKER.fullmatch(word) for word in columns[slot])]
    folders = [slot for slot in possible if slot[0] == "folder"]
    if named and named[0] not in folders and any(_crosses(columns[named[0]], columns[slot]) for slot in folders):
        return None
    return next(iter((*named, *folders)), None)


def _crosses(words: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a word is in several folders, as the number of a sentence is where every speaker has a folder."""
    return len(set(zip(words, folders, strict=True))) > len(set(words))


def _skeleton(path: Path) -> tuple[str, dict[str, Slot]]:
    """A path as a pattern that numbers its places, and which they are.

    >>> _skeleton(Path("0/12-f.wav"))[0]
    '{1}/{2}-{3}.*'
    """
    slots: list[Slot] = [("folder", number) for number in reversed(range(len(path.parts) - 1))]
    parts = BETWEEN.split(path.stem)
    slots += [("name", number) for number, word in enumerate(parts[::2]) if word]
    numbered = {str(number): slot for number, slot in enumerate(slots, start=1)}
    number_of = {slot: f"{{{number}}}" for number, slot in numbered.items()}
    folders = "".join(f"{number_of[slot]}/" for slot in slots if slot[0] == "folder")
    name = "".join(
        part if number % 2 else number_of.get(("name", number // 2), "") for number, part in enumerate(parts)
    )
    return f"{folders}{name}.*", numbered


def _in_words(slot: Slot) -> str:
    kind, number = slot
    if kind == "name":
        return f"part {number + 1} of the name"
    return "the folder" if number == 0 else f"the folder {number} above"


def word_counts(rows: Iterable[Mapping[str, str]], field: str) -> Counter[str]:
    """How often each word occurs in a field of a `Guess`."""
    return Counter(row.get(field, "") for row in rows)
