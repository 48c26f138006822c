"""RAVDESS, the Ryerson Audio-Visual Database of Emotional Speech and Song: its speech.

24 actors (12 women, 12 men), North American English, 2 statements, 8 emotions, each twice in two intensities (neutral
in one): 1440 utterances. Song is `ravdess_song`; video is left out.

Livingstone and Russo (2018), PLoS ONE 13(5): e0196391, https://doi.org/10.1371/journal.pone.0196391
Home: https://zenodo.org/records/1188976 (Audio_Speech_Actors_01-24.zip). Licence: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ser_ray.schema import Utterance

SPEECH: Final = "acted"
LICENCE: Final = "CC BY-NC-SA 4.0"
EMOTIONS: Final = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgust",
    "08": "surprised",
}
INTENSITIES: Final = {"01": "normal", "02": "strong"}
MODALITIES: Final = {"01": "audio-video", "02": "video"}
"""Modalities that are not used; 03 is audio."""
STATEMENTS: Final = ("01", "02")
"""Kids are talking by the door; dogs are sitting by the door."""
CHANNELS: Final = {"01": "speech", "02": "song"}
ACTORS: Final = tuple(f"{actor:02}" for actor in range(1, 25))
"""Odd numbers are men, even ones women."""
PUBLISHED: Final = {
    "utterances": 1440,
    "speakers": 24,
    "emotions": {emotion: 96 if emotion == "neutral" else 192 for emotion in EMOTIONS.values()},
}
"""Source: the home page."""


def parse(path: Path) -> Utterance:
    """``Actor_12/03-01-05-01-02-01-12.wav``: modality, channel, emotion, intensity, statement, repetition, actor.

    >>> parse(Path("Actor_12/03-01-05-01-02-01-12.wav")).emotion
    'angry'

    Raises ValueError for every other name, and where the folder names another actor.
    """
    return parse_channel(path, "01")


def parse_channel(path: Path, wanted: str) -> Utterance:
    """`parse` for the channel ``wanted`` (01 speech, 02 song); the utterance's corpus is ``ravdess`` for both."""
    if not re.fullmatch(r"\d\d(-\d\d){6}", path.stem, re.ASCII):
        raise ValueError("the name is not seven two-digit numbers, such as 03-01-05-01-02-01-12")
    modality, channel, emotion, intensity, statement, repetition, actor = path.stem.split("-")
    if modality in MODALITIES:
        raise ValueError(f"{MODALITIES[modality]} (modality {modality}); only audio (03) is used")
    if channel in CHANNELS and channel != wanted:
        raise ValueError(f"{CHANNELS[channel]} (channel {channel}); only {CHANNELS[wanted]} ({wanted}) is used")
    for field, value, known in (
        ("modality", modality, ("03",)),
        ("channel", channel, tuple(CHANNELS)),
        ("emotion", emotion, EMOTIONS),
        ("intensity", intensity, INTENSITIES),
        ("statement", statement, STATEMENTS),
        ("repetition", repetition, ("01", "02")),
        ("actor", actor, ACTORS),
    ):
        if value not in known:
            raise ValueError(f"{field} {value} does not exist; known: {', '.join(known)}")
    for folder in path.parts[:-1]:
        if re.fullmatch(r"Actor_\d\d", folder, re.ASCII) and folder != f"Actor_{actor}":
            raise ValueError(f"the name says actor {actor}, the folder {folder}")
    return Utterance(
        utterance_id=f"ravdess/{path.stem}",
        corpus="ravdess",
        speaker=f"ravdess/{actor}",
        emotion=EMOTIONS[emotion],
        path=path.as_posix(),
        text_id=statement,
        intensity=INTENSITIES[intensity],
        gender="male" if int(actor) % 2 else "female",
        language="en",
    )
