"""Stand-ins for corpora that people bring: the folders and names of the real ones, with synthetic speech inside.

Each writes its recordings below a folder and returns what is true of them: the path, speaker and emotion of each, in
the words of its folders and names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

RATE = 16_000


class Truth(NamedTuple):
    path: str
    speaker: str
    emotion: str


def nemo_like(folder: Path) -> list[Truth]:
    """Named like nEMO (arXiv 2404.06292): a folder a speaker, the emotion first in the name, in nouns: 108 recordings
    of 6 speakers."""
    emotions = ("anger", "fear", "happiness", "neutral", "sadness", "surprise")
    named = (
        Truth(f"{speaker}/{emotion}_{sentence}_{number}.wav", speaker, emotion)
        for speaker in ("AKA", "BOR", "EWA", "JAN", "OLA", "PIO")
        for emotion in emotions
        for number, sentence in enumerate((12, 40, 77), start=1)
    )
    return _written(folder, named)


def baved_like(folder: Path) -> list[Truth]:
    """Named like BAVED (https://github.com/40uf411/Basic-Arabic-Vocal-Emotions-Dataset): speaker, gender, age, word,
    emotion, recording; the emotion is a level from 0 to 2, and the folders are the words: 126 recordings of 6 speakers.
    """
    people = (("3", "f", 21), ("12", "f", 19), ("31", "m", 20), ("46", "m", 20), ("53", "m", 24), ("56", "f", 40))
    named = (
        Truth(f"{word}/{speaker}-{gender}-{age}-{word}-{level}-{1000 + 21 * n + 3 * word + level}.wav", speaker, level)
        for n, (speaker, gender, age) in enumerate(people)
        for word in range(7)
        for level in (0, 1, 2)
    )
    return _written(folder, (truth._replace(emotion=str(truth.emotion)) for truth in named))


def urdu_like(folder: Path) -> list[Truth]:
    """Named like URDU (https://github.com/siddiquelatif/URDU-Dataset): a folder an emotion; speaker, number of the
    speaker's recording, number of the emotion's recording: 96 recordings of 14 speakers, of whom 8 have one emotion.
    """
    emotions = ("Angry", "Happy", "Neutral", "Sad")
    spoken = [(f"S{'FM'[n % 2]}{n}", emotion) for n in range(1, 7) for emotion in emotions]
    spoken += [(f"S{'FM'[n % 2]}{n}", emotions[n % 4]) for n in range(7, 15)]
    taken = [(speaker, emotion) for speaker, emotion in spoken for _ in range(3)]
    named = [
        Truth(
            f"{emotion}/{speaker}_F{[s for s, _ in taken[: n + 1]].count(speaker)}"
            f"_{emotion[0]}{[e for _, e in taken[: n + 1]].count(emotion):03d}.wav",
            speaker,
            emotion,
        )
        for n, (speaker, emotion) in enumerate(taken)
    ]
    return _written(folder, named)


# -- below: how it is done


def _written(folder: Path, named: Iterator[Truth] | list[Truth]) -> list[Truth]:
    truths = sorted(named)
    emotions = sorted({truth.emotion for truth in truths})
    speakers = sorted({truth.speaker for truth in truths})
    rng = np.random.default_rng(0)
    for path, speaker, emotion in truths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        sound = _voice(emotions.index(emotion), speakers.index(speaker), rng)
        soundfile.write(folder / path, sound, RATE, subtype="PCM_16")
    return truths


def _voice(emotion: int, speaker: int, rng: np.random.Generator) -> np.ndarray:
    """About a second: an emotion is a pitch and a speed, a speaker a factor on the pitch; in a little noise. Pitch and
    timbre wander, as the audit takes two steady tones for one recording."""
    time = np.arange(int(rng.uniform(0.8, 1.2) * RATE)) / RATE
    knots = np.linspace(0, time[-1], 8)
    pitch = 110 * 1.18**emotion * (1 + 0.05 * speaker) * np.interp(time, knots, rng.uniform(0.85, 1.15, 8))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    harmonics = sum(np.interp(time, knots, rng.uniform(0, 1, 8)) * np.sin(phase * k) / k for k in range(1, 9))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * (1.5 + 0.8 * emotion) * time + rng.uniform(0, 6))
    return 0.3 * harmonics * syllables + 0.003 * rng.standard_normal(len(time))
