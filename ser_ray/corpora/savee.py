"""SAVEE, the Surrey Audio-Visual Expressed Emotion database: its audio.

4 men, British English, 7 emotions, 15 sentences in each and 30 in neutral: 480 utterances.

Haq and Jackson (2010), "Multimodal emotion recognition", in Machine Audition, IGI Global, 398-423,
https://doi.org/10.4018/978-1-61520-919-4.ch017
Home: http://kahlan.eps.surrey.ac.uk/savee (free for research, on registration; see there).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ser_ray.schema import Utterance

SPEECH: Final = "acted"
EMOTIONS: Final = {
    "a": "angry",
    "d": "disgust",
    "f": "fear",
    "h": "happy",
    "n": "neutral",
    "sa": "sad",
    "su": "surprised",
}
SENTENCES: Final = {emotion: 30 if emotion == "n" else 15 for emotion in EMOTIONS}
SPEAKERS: Final = ("DC", "JE", "JK", "KL")
PUBLISHED: Final = {
    "utterances": 480,
    "speakers": 4,
    "emotions": {name: 4 * SENTENCES[code] for code, name in EMOTIONS.items()},
}
"""Source: the home page; names and layout as in the corpus's Info.txt."""


def parse(path: Path) -> Utterance:
    """``DC/sa01.wav`` or ``DC_sa01.wav``: speaker, emotion, number of the sentence.

    >>> parse(Path("AudioData/JK/su15.wav")).speaker
    'savee/JK'

    Raises ValueError for every other name.
    """
    match = re.fullmatch(r"(?:([A-Z]{2})_)?([a-z]{1,2})(\d\d)", path.stem, re.ASCII)
    if not match:
        raise ValueError("the name is not emotion and number, such as DC/a01 or DC_a01")
    speaker, emotion, number = match[1] or path.parent.name, match[2], match[3]
    if speaker not in SPEAKERS:
        raise ValueError(f"speaker {speaker!r} does not exist; known: {', '.join(SPEAKERS)}")
    if emotion not in EMOTIONS:
        raise ValueError(f"emotion {emotion!r} does not exist; known: {', '.join(EMOTIONS)}")
    if path.parent.name in SPEAKERS and path.parent.name != speaker:
        raise ValueError(f"the name says speaker {speaker}, the folder {path.parent.name}")
    if not 1 <= int(number) <= SENTENCES[emotion]:
        raise ValueError(f"sentence {number} does not exist; {EMOTIONS[emotion]} has 01 to {SENTENCES[emotion]}")
    return Utterance(
        utterance_id=f"savee/{speaker}_{emotion}{number}",
        corpus="savee",
        speaker=f"savee/{speaker}",
        emotion=EMOTIONS[emotion],
        path=path.as_posix(),
        text_id=f"{emotion}{number}",
        gender="male",
        language="en",
    )
