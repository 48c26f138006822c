"""The data types of the project: utterances, folds, errors, and the names of emotions and splits.

Every other module may import this one; it imports none of the project's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

SAMPLING_RATE: Final = 16_000
"""Hz: the rate on which every supported backbone was pre-trained, and the rate of the shards."""

EMOTIONS: Final = (
    "angry",
    "disgust",
    "fear",
    "happy",
    "neutral",
    "sad",
    "surprised",
    "calm",
    "boredom",
)
"""The canonical emotions. The first seven are the default of an experiment; the others occur in some corpora. The set
is open: any other word is an emotion too."""

SPLITS: Final = ("train", "dev", "test")
TIE: Final = "tie"
"""In place of a perceived emotion: listeners voted, and no emotion got more votes than every other."""


_UNKNOWN: Final = "unknown#"


def unknown_speaker(corpus: str, recording: str) -> str:
    """In place of a speaker who is not known: a name of that recording alone, so that what splits by speakers splits by
    recordings.

    >>> unknown_speaker("mine", "a.wav"), is_known("mine/anna"), is_known(unknown_speaker("mine", "a.wav"))
    ('mine/unknown#a.wav', True, False)
    """
    return f"{corpus}/{_UNKNOWN}{recording}"


def is_known(speaker: str) -> bool:
    """Whether a speaker is known."""
    return not speaker.partition("/")[2].startswith(_UNKNOWN)


class UserError(ValueError):
    """An error that the user can fix: shown as one line (what, where, what to do), exit code 2. Further arguments are
    further lines, where there are several problems.

    >>> str(UserError("mine.yaml: 2 problems", "line 3: ...", "line 7: ..."))
    'mine.yaml: 2 problems\\nline 3: ...\\nline 7: ...'
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class StorageError(UserError):
    """A path cannot be written any more: no other process could write there either."""


class MemoryShortageError(UserError):
    """A model and its batch did not fit into memory: with smaller batches they may."""


class LostMessageError(UserError):
    """Ray has lost a message for this process, which hears of no other any more; a new connection to Ray helps."""


class ProcessDiedError(UserError):
    """A process was killed from outside, as by a lost machine or Ray's memory monitor: trying again may help."""


def reason_of(error: Exception, most: int | None = None) -> str:
    """What an error of a library says, in one line of at most ``most`` characters.

    >>> reason_of(ValueError("line 3:\\n   no colon"))
    'line 3: no colon'
    """
    if isinstance(error, RecursionError):
        return "nested too deep"
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def first_few(words: Sequence[str], most: int) -> str:
    """At most so many of the words, and how many more there are.

    >>> first_few(["angry", "happy", "sad"], 2)
    'angry, happy and 1 more'
    """
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def shortened(text: str, most: int = 80) -> str:
    """What a file says, for a message that quotes it: a damaged table may hold all of itself in one cell.

    At most ``most`` characters as they are shown, which is ``\\x00`` for one that cannot be printed.

    >>> shortened("angry"), shortened("ha" * 100, 6), shortened(chr(0) * 3, 6) == chr(0) + "..."
    ('angry', 'hahaha...', True)
    """
    widths = itertools.accumulate(1 if character.isprintable() else len(r"\x00") for character in text)
    fitting = sum(1 for _ in itertools.takewhile(lambda width: width <= most, widths))
    return text if fitting == len(text) else f"{text[:fitting]}..."


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one speaker, as a corpus describes it.

    ``utterance_id`` and ``speaker`` begin with the corpus's name (``ravdess/03-01-05-01-01-01-12``,
    ``ravdess/12``), so that both are unique over all corpora of an experiment; a speaker of two corpora has the same
    name in both.
    """

    utterance_id: str
    corpus: str
    speaker: str
    emotion: str
    path: str
    text_id: str | None = None
    intensity: str | None = None
    gender: str | None = None
    language: str | None = None
    split: str | None = None
    """The split that the corpus itself assigns, if any."""
    perceived: str | None = None
    """The emotion that most listeners perceived, or `TIE`; None if none voted."""
    agreement: float | None = None
    """The share of listeners who perceived it."""
    start: float | None = None
    """Seconds into the recording at which the utterance begins, if it is a part of one; ``end``: at which it ends."""
    end: float | None = None

    def __post_init__(self) -> None:
        if not self.emotion:
            raise ValueError(f"{self.path}: no emotion")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that is not used, and the reason, human-readable."""

    path: str
    reason: str


@dataclass(frozen=True)
class Fold:
    """The split of every utterance, by id; never stored in shards."""

    splits: Mapping[str, str]
    leaky: bool
    description: str
    common_emotions: bool = False
    """Whether emotions that train or test lack are left out by design."""
