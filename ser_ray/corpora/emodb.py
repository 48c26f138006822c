"""EmoDB, the Berlin Database of Emotional Speech.

10 actors (5 women, 5 men), German, 10 sentences, 7 emotions (with boredom, without surprise): 535 utterances, the ones
of about 800 that listeners recognised and found natural.

Burkhardt, Paeschke, Rolfes, Sendlmeier and Weiss (2005), Interspeech, 1517-1520,
https://doi.org/10.21437/Interspeech.2005-446
Home: http://emodb.bilderbar.info (free for use; see there).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ser_ray.schema import Utterance

SPEECH: Final = "acted"
EMOTIONS: Final = {
    "W": "angry",  # Wut, Aerger
    "L": "boredom",  # Langeweile
    "E": "disgust",  # Ekel
    "A": "fear",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
SPEAKERS: Final = {
    "03": "male",
    "08": "female",
    "09": "female",
    "10": "male",
    "11": "male",
    "12": "male",
    "13": "female",
    "14": "female",
    "15": "male",
    "16": "female",
}
SENTENCES: Final = ("a01", "a02", "a04", "a05", "a07", "b01", "b02", "b03", "b09", "b10")
PUBLISHED: Final = {
    "utterances": 535,
    "speakers": 10,
    "emotions": {"angry": 127, "boredom": 81, "disgust": 46, "fear": 69, "happy": 71, "neutral": 79, "sad": 62},
}
"""As the corpus is distributed."""


def parse(path: Path) -> Utterance:
    """``03a01Fa.wav``: speaker, sentence, emotion (the German initial), version.

    >>> parse(Path("16b10Wb.wav")).emotion
    'angry'

    Raises ValueError for every other name.
    """
    match = re.fullmatch(r"(\d\d)([ab]\d\d)([A-Z])([a-z])", path.stem, re.ASCII)
    if not match:
        raise ValueError("the name is not speaker, sentence, emotion, version, such as 03a01Fa")
    speaker, sentence, emotion, _ = match.groups()
    for field, value, known in (
        ("speaker", speaker, tuple(SPEAKERS)),
        ("sentence", sentence, SENTENCES),
        ("emotion", emotion, tuple(EMOTIONS)),
    ):
        if value not in known:
            raise ValueError(f"{field} {value} does not exist; known: {', '.join(known)}")
    return Utterance(
        utterance_id=f"emodb/{path.stem}",
        corpus="emodb",
        speaker=f"emodb/{speaker}",
        emotion=EMOTIONS[emotion],
        path=path.as_posix(),
        text_id=sentence,
        gender=SPEAKERS[speaker],
        language="de",
    )
