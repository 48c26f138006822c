"""RAVDESS, the Ryerson Audio-Visual Database of Emotional Speech and Song: its song.

23 of the 24 actors (18 did not sing), 2 statements on one melody, 6 emotions (no disgust, no surprise), each twice in
two intensities (neutral in one): 1012 utterances. Singing is another task than speaking: a corpus of its own here.

Paper, home and licence as in `ravdess` (Audio_Song_Actors_01-24.zip).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from ser_ray.corpora.ravdess import parse_channel
from ser_ray.schema import Utterance

SUNG: Final = {"neutral": 92} | dict.fromkeys(("calm", "happy", "sad", "angry", "fear"), 184)
PUBLISHED: Final = {"utterances": 1012, "speakers": 23, "emotions": SUNG}
"""The home page."""


def parse(path: Path) -> Utterance:
    """``Actor_12/03-02-05-01-02-01-12.wav``, as RAVDESS's speech with channel 02.

    >>> parse(Path("03-02-05-01-02-01-12.wav")).speaker
    'ravdess_song/12'

    Raises ValueError for every other name, for what nobody sang, and where the folder names another actor.
    """
    spoken = parse_channel(path, "02")
    if spoken.emotion not in SUNG:
        raise ValueError(f"emotion {spoken.emotion} was not sung")
    if spoken.speaker == "ravdess/18":
        raise ValueError("actor 18 did not sing")
    corpus = "ravdess_song"
    return replace(
        spoken,
        utterance_id=f"{corpus}/{path.stem}",
        corpus=corpus,
        speaker=f"{corpus}/{spoken.speaker.removeprefix('ravdess/')}",
    )
