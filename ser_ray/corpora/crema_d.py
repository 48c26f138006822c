"""CREMA-D, the Crowd-sourced Emotional Multimodal Actors Dataset.

91 actors (48 men, 43 women), American English, 12 sentences, 6 emotions (no surprise), one sentence in three
intensities: 7442 utterances. Emotions are the intended ones; what listeners heard by voice alone is read from the
corpus's own tables where they lie beside the audio. Where two emotions or more were heard equally often (644
utterances), there is no emotion that most heard: these are marked as ties, and ``label: perceived`` leaves them out.

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
EMOTIONS: Final = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
INTENSITIES: Final = {"LO": "low", "MD": "medium", "HI": "high", "XX": None, "X": None}
"""XX is unspecified; a published recording spells it X."""
MISSPELT: Final = {"1040_ITH_SAD_X": "1040_ITH_SAD_XX"}
"""That recording, and what the tables call it."""
SENTENCES: Final = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
ACTORS: Final = tuple(str(actor) for actor in range(1001, 1092))
VOTES: Final = {emotion[0]: name for emotion, name in EMOTIONS.items()}
"""The letters of the tables; several, as in A:D, are a tie."""
PLACES: Final = ("", "processedResults", "data/InfoAndStats/processedResults", "data/InfoAndStats")
"""Where the corpus keeps its tables, beside or above the audio."""
PUBLISHED: Final = {
    "utterances": 7442,
    "speakers": 91,
    "emotions": {emotion: 1087 if emotion == "neutral" else 1271 for emotion in EMOTIONS.values()},
}
"""The home page and its SentenceFilenames.csv."""


def parse(path: Path) -> Utterance:
    """``1001_DFA_ANG_XX.wav``: actor, sentence, emotion, intensity.

    >>> parse(Path("1001_IEO_FEA_HI.wav")).intensity
    'high'

    Raises ValueError for every other name. Gender is left open: names do not tell it.
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
    """Add what the corpus's tables say: gender, and the emotion that most listeners heard with their agreement.

    ``VideoDemographics.csv`` has the actors' sex; ``tabulatedVotes.csv`` the votes on every clip, of which the rows
    whose name begins with 1 are those by voice alone; ``summaryTable.csv``, where the former is absent, the winners
    without the agreement. Several winners are a tie (`schema.TIE`).

    Raises UserError, with file and line, for a table that is not what it should be or contradicts itself.
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
    """The rows of one of the corpus's tables with their place, for messages; none where it is absent."""
    candidates = (root / place / name for root in (directory, directory.parent) for place in PLACES)
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [column for column in _COLUMNS[name] if column not in (reader.fieldnames or ())]:
                raise UserError(f"{path}, line 1: no column {missing[0]!r}; take the file from the corpus's home again")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if any(row[column] is None for column in _COLUMNS[name]):
                    raise UserError(f"{where}: cut short; take the file from the corpus's home again")
                yield row, where
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV: {error}; take the file from the corpus's home again") from None


def _note(known: dict[str, T], key: str, value: T, where: str) -> None:
    if known.setdefault(key, value) != value:
        raise UserError(f"{where}: {key} occurs before, and otherwise; take the file from the corpus's home again")


def _winner(votes: str, where: str) -> str:
    letters = votes.split(":")
    if unknown := [letter for letter in letters if letter not in VOTES]:
        raise UserError(f"{where}: vote {unknown[0]!r} is none of {', '.join(VOTES)}")
    return VOTES[letters[0]] if len(letters) == 1 else TIE


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"{where}: agreement {text!r} is no share between 0 and 1")
    return share


def _gender(row: dict[str, str], where: str) -> str:
    gender = row["Sex"].lower()
    if gender not in ("male", "female"):
        raise UserError(f"{where}: Sex {row['Sex']!r} is neither Male nor Female")
    return gender
