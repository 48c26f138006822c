"""CREMA-D, the Crowd-sourced Emotional Multimodal Actors Dataset.

91 actors (48 men, 43 women), American English, 12 sentences, 6 emotions (no surprise), one sentence in three
intensities: 7442 utterances. Emotions are the intended ones. The emotions that listeners perceived from the voice alone
are read from the corpus's own tables if these are in one of `PLACES`. Where two or more emotions share the most votes
(644 utterances), the utterance is marked as a tie, and ``label: perceived`` leaves it out.

Cao, Cooper, Keutmann, Gur, Nenkova and Verma (2014), IEEE Transactions on Affective Computing 5(4), 377-390,
https://doi.org/10.1109/TAFFC.2014.2336244
Home: https://github.com/CheyneyComputerScience/CREMA-D (AudioWAV). Licence: Open Database License 1.0.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from ser_ray.schema import TIE, UserError, Utterance

SPEECH: Final = "acted"
LICENCE: Final = "Open Database License 1.0"
EMOTIONS: Final = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
INTENSITIES: Final = {"LO": "low", "MD": "medium", "HI": "high", "XX": None, "X": None}
"""XX is unspecified; one published file name spells it X."""
MISSPELT: Final = {"1040_ITH_SAD_X": "1040_ITH_SAD_XX"}
"""The name of that file, and its name in the tables."""
SENTENCES: Final = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
ACTORS: Final = tuple(str(actor) for actor in range(1001, 1092))
VOTES: Final = {emotion[0]: name for emotion, name in EMOTIONS.items()}
"""The letters in the tables; several, as in A:D, are a tie."""
PLACES: Final = ("", "processedResults", "data/InfoAndStats/processedResults", "data/InfoAndStats")
"""Folders of the corpus's tables, relative to the audio's directory or to its parent."""
PUBLISHED: Final = {
    "utterances": 7442,
    "speakers": 91,
    "emotions": {emotion: 1087 if emotion == "neutral" else 1271 for emotion in EMOTIONS.values()},
}
"""Source: the home page and its SentenceFilenames.csv."""


def parse(path: Path) -> Utterance:
    """``1001_DFA_ANG_XX.wav``: actor, sentence, emotion, intensity.

    >>> parse(Path("1001_IEO_FEA_HI.wav")).intensity
    'high'

    Raises ValueError for every other name. Gender is not set, as names do not contain it.
    """
    fields = path.stem.split("_")
    if len(fields) != 4:
        raise ValueError("the name is not actor_sentence_emotion_level, such as 1001_DFA_ANG_XX")
    actor, sentence, emotion, level = fields
    if actor not in ACTORS:
        raise ValueError(f"actor {actor!r} does not exist; known: {ACTORS[0]} to {ACTORS[-1]}")
    for field, value, known in (
        ("sentence", sentence, SENTENCES),
        ("emotion", emotion, tuple(EMOTIONS)),
        ("level", level, tuple(INTENSITIES)),
    ):
        if value not in known:
            raise ValueError(f"{field} {value!r} does not exist; known: {', '.join(known)}")
    return Utterance(
        utterance_id=f"crema_d/{path.stem}",
        corpus="crema_d",
        speaker=f"crema_d/{actor}",
        emotion=EMOTIONS[emotion],
        path=path.as_posix(),
        text_id=sentence,
        intensity=INTENSITIES[level],
        language="en",
    )


def annotate(directory: Path, utterances: Sequence[Utterance]) -> list[Utterance]:
    """Add gender, the emotion that most listeners perceived, and their agreement, from the corpus's tables.

    ``VideoDemographics.csv`` has the actors' sex. ``tabulatedVotes.csv`` has the votes on every clip; rows whose name
    begins with 1 are votes on the voice alone. ``summaryTable.csv`` has the winners without the agreement, and is used
    for clips that ``tabulatedVotes.csv`` lacks. Several winners are a tie (`schema.TIE`).

    Raises UserError, with the file and (unless it is not CSV) the line, for a table that is malformed or contradicts
    itself.
    """
    gender_of: dict[str, str] = {}
    for row, where in _rows(directory, "VideoDemographics.csv"):
        _note(gender_of, row["ActorID"], _gender(row, where), where)
    winners: dict[str, Perceived] = {}
    for row, where in _rows(directory, "summaryTable.csv"):
        _note(winners, row["FileName"], (_winner(row["VoiceVote"], where), None), where)
    shares: dict[str, Perceived] = {}
    for row, where in _rows(directory, "tabulatedVotes.csv"):
        if row[""].startswith("1"):
            _note(shares, row["fileName"], (_winner(row["emoVote"], where), _share(row["agreement"], where)), where)
    perceived_of = winners | shares
    annotated = []
    for utterance in utterances:
        clip = utterance.utterance_id.removeprefix("crema_d/")
        perceived, agreement = perceived_of.get(MISSPELT.get(clip, clip), (None, None))
        gender = gender_of.get(utterance.speaker.removeprefix("crema_d/"))
        annotated.append(replace(utterance, gender=gender, perceived=perceived, agreement=agreement))
    return annotated


# -- below: how it is done

T = TypeVar("T")
Perceived = tuple[str, float | None]

_COLUMNS: Final = {
    "VideoDemographics.csv": ("ActorID", "Sex"),
    "summaryTable.csv": ("FileName", "VoiceVote"),
    "tabulatedVotes.csv": ("", "fileName", "emoVote", "agreement"),
}


def _rows(directory: Path, name: str) -> Iterator[tuple[dict[str, str], str]]:
    """The rows of one of the corpus's tables, each with its file and line for messages; none if the table is absent."""
    candidates = (root / place / name for root in (directory, directory.parent) for place in PLACES)
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [column for column in _COLUMNS[name] if column not in (reader.fieldnames or ())]:
                raise UserError(f"{path}, line 1: no column {missing[0]!r}; download the file again")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(row[column] is None for column in _COLUMNS[name]):
                    raise UserError(f"{where}: cut short; download the file again")
                yield row, where
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV: {error}; download the file again") from None


def _note(known: dict[str, T], key: str, value: T, where: str) -> None:
    if known.setdefault(key, value) != value:
        raise UserError(f"{where}: {key} occurs earlier with another value; download the file again")


def _winner(votes: str, where: str) -> str:
    letters = votes.split(":")
    if unknown := [letter for letter in letters if letter not in VOTES]:
        raise UserError(f"{where}: vote {unknown[0]!r} is not one of {', '.join(VOTES)}")
    return VOTES[letters[0]] if len(letters) == 1 else TIE


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"{where}: agreement {text!r} is not a number between 0 and 1")
    return share


def _gender(row: dict[str, str], where: str) -> str:
    gender = row["Sex"].lower()
    if gender not in ("male", "female"):
        raise UserError(f"{where}: Sex {row['Sex']!r} is neither Male nor Female")
    return gender
