"""RAVDESS, the Ryerson Audio-Visual Database of Emotional Speech and Song: its song.

23 of the 24 actors (actor 18 did not sing), 2 statements on one melody, 6 emotions (no disgust, no surprise), each
twice in two intensities (neutral in one): 1012 utterances. Singing is a different task from speaking, so it is a corpus
of its own. Speakers have the same names as in `ravdess`, as they are the same people: a fold over both corpora must
assign a speaker's speech and song to the same split.

Paper, home and licence as in `ravdess` (Audio_Song_Actors_01-24.zip).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from ser_ray.corpora.ravdess import parse_channel
from ser_ray.schema import Utterance

SPEECH: Final = "acted"
LICENCE: Final = "CC BY-NC-SA 4.0"
SUNG: Final = {"neutral": 92} | dict.fromkeys(("calm", "happy", "sad", "angry", "fear"), 184)
PUBLISHED: Final = {"utterances": 1012, "speakers": 23, "emotions": SUNG}
"""Source: the home page."""


def parse(path: Path) -> Utterance:
    """``Actor_12/03-02-05-01-02-01-12.wav``: as in RAVDESS's speech, with channel 02.

    >>> song = parse(Path("03-02-05-01-02-01-12.wav"))
    >>> song.utterance_id, song.speaker
    ('ravdess_song/03-02-05-01-02-01-12', 'ravdess/12')

    Raises ValueError for every other name, for an emotion or actor without song, and where the folder names another
    actor.
    """
    sung = parse_channel(path, "02")
    if sung.emotion not in SUNG:
        raise ValueError(f"emotion {sung.emotion} was not sung")
    if sung.speaker == "ravdess/18":
        raise ValueError("actor 18 did not sing")
    return replace(sung, utterance_id=f"ravdess_song/{path.stem}", corpus="ravdess_song")
