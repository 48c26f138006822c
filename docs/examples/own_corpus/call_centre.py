"""Calls named like agent07_angry_0031.wav: the speaker, the emotion, the number of the recording."""

import re
from pathlib import Path

from ser_ray.schema import Utterance

SPEECH = "spontaneous"
EMOTIONS = {"angry", "happy", "neutral", "sad"}


def parse(path: Path) -> Utterance:
    """Read one file name. Raises ValueError, with the reason, for a name that is not one of the corpus's."""
    name = re.fullmatch(r"(agent\d+)_([a-z]+)_(\d+)", path.stem)
    if name is None:
        raise ValueError("the name is not speaker_emotion_number")
    speaker, emotion, _ = name.groups()
    if emotion not in EMOTIONS:
        raise ValueError(f"{emotion} is not one of {', '.join(sorted(EMOTIONS))}")
    return Utterance(f"call_centre/{path.stem}", "call_centre", f"call_centre/{speaker}", emotion, path.as_posix())
