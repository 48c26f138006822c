"""CREMA-D, the Crowd-sourced Emotional Multimodal Actors Dataset.

91 actors (48 men, 43 women), American English, 12 sentences, 6 emotions (no surprise), one sentence in three
intensities: 7442 utterances. Emotions are the intended ones.

Cao, Cooper, Keutmann, Gur, Nenkova and Verma (2014), IEEE Transactions on Affective Computing 5(4), 377-390,
https://doi.org/10.1109/TAFFC.2014.2336244
Home: https://github.com/CheyneyComputerScience/CREMA-D (AudioWAV). Licence: Open Database License 1.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ser_ray.schema import Utterance

EMOTIONS: Final = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
INTENSITIES: Final = {"LO": "low", "MD": "medium", "HI": "high", "XX": None, "X": None}
"""XX is unspecified; at least one published file (1040_ITH_SAD_X) spells it X."""
SENTENCES: Final = ("DFA", "IEO", "IOM", "ITH", "ITS", "IWL", "IWW", "MTI", "TAI", "TIE", "TSI", "WSI")
ACTORS: Final = tuple(str(actor) for actor in range(1001, 1092))


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
