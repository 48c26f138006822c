"""TESS, the Toronto Emotional Speech Set.

2 actresses (aged 64, OAF, and 26, YAF), Canadian English, 200 words after "Say the word", 7 emotions: 2800 utterances.
With two speakers, a speaker-disjoint split trains on one voice: read its metrics with that in mind.

Pichora-Fuller and Dupuis (2020), Toronto emotional speech set, https://doi.org/10.5683/SP2/E8H2MF
(home and download). Licence: Creative Commons, non-commercial; see there for its version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ser_ray.schema import Utterance

SPEECH: Final = "acted"
LICENCE: Final = "Creative Commons, non-commercial"
EMOTIONS: Final = {
    "angry": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "happy",
    "neutral": "neutral",
    "ps": "surprised",
    "pleasant_surprise": "surprised",
    "pleasant_surprised": "surprised",
    "sad": "sad",
}
SPEAKERS: Final = {"OAF": "OAF", "OA": "OAF", "YAF": "YAF"}
"""A published file, OA_bite_neutral.wav, lacks a letter."""
PUBLISHED: Final = {"utterances": 2800, "speakers": 2, "emotions": dict.fromkeys(EMOTIONS.values(), 400)}
"""Source: the home page."""


def parse(path: Path) -> Utterance:
    """``OAF_back_angry.wav``: speaker, word, emotion, in upper or lower case; in a folder such as
    ``OAF_Pleasant_surprise`` or ``YAF_pleasant_surprised``, or in any other.

    >>> parse(Path("YAF_dog_ps.wav")).emotion
    'surprised'

    Raises ValueError for every other name, and where the folder names another speaker or emotion.
    """
    match = re.fullmatch(r"([A-Za-z]+)_([A-Za-z]+)_([A-Za-z_]+)", path.stem)
    if not match:
        raise ValueError("the name is not speaker_word_emotion, such as OAF_back_angry")
    speaker, word, emotion = match[1].upper(), match[2].lower(), match[3].lower()
    if speaker not in SPEAKERS:
        raise ValueError(f"speaker {match[1]!r} does not exist; known: {', '.join(SPEAKERS)}")
    if emotion not in EMOTIONS:
        raise ValueError(f"emotion {match[3]!r} does not exist; known: {', '.join(EMOTIONS)}")
    folder = re.fullmatch(r"([A-Za-z]+)_([A-Za-z_]+)", path.parent.name)
    if folder and folder[1].upper() in SPEAKERS and folder[2].lower() in EMOTIONS:
        said = (SPEAKERS[folder[1].upper()], EMOTIONS[folder[2].lower()])
        if said != (SPEAKERS[speaker], EMOTIONS[emotion]):
            raise ValueError(f"the name says {SPEAKERS[speaker]}, {EMOTIONS[emotion]}, the folder {', '.join(said)}")
    return Utterance(
        utterance_id=f"tess/{path.stem}",
        corpus="tess",
        speaker=f"tess/{SPEAKERS[speaker]}",
        emotion=EMOTIONS[emotion],
        path=path.as_posix(),
        text_id=word,
        gender="female",
        language="en",
    )
