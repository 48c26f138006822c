"""What a word for an emotion means: one table of the words and codes that corpora use, with where they come from.

The set of emotions is open: a word that is not in the table is an emotion of its own. The table holds other forms of
one word, and synonyms; words that are near to one another, as ``excited`` and ``happy``, ``annoyed`` and ``angry`` or
``anxious`` and ``fear``, are different emotions somewhere, and stay apart. So do single letters (A is anger in CREMA-D
and Angst, fear, in EmoDB) and ``normal``, which is a level of intensity as often as it is neutral.
``experiment.labels`` says otherwise for a corpus.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

WORDS: Final = {
    # The emotions of Ekman and Friesen (1971), as nouns and as adjectives: MELD (arXiv 1810.02508) has anger, joy,
    # sadness, surprise; TESS (doi 10.5683/SP2/E8H2MF) fear, happiness, pleasant surprise; RAVDESS (doi
    # 10.1371/journal.pone.0196391) fearful, surprised; nEMO (arXiv 2404.06292) anger, happiness, sadness.
    # The codes of three letters: CREMA-D (doi 10.1109/TAFFC.2014.2336244), IEMOCAP (doi 10.1007/s10579-008-9076-6).
    "angry": ("anger", "ang"),
    "disgust": ("disgusted", "dis"),
    "fear": ("fearful", "afraid", "scared", "fea"),
    "happy": ("happiness", "joy", "joyful", "hap"),
    "neutral": ("neutrality", "neu"),
    "sad": ("sadness",),
    "surprised": ("surprise", "pleasant surprise", "pleasant surprised", "pleasantly surprised", "sur"),
    "calm": ("calmness",),  # RAVDESS
    "boredom": ("bored", "bor"),  # EmoDB (doi 10.21437/Interspeech.2005-446)
    # Emotions beside the nine: IEMOCAP's codes, and the nouns.
    "excited": ("excitement", "exc"),
    "frustrated": ("frustration", "fru"),
    "contempt": ("contemptuous",),  # MSP-Podcast (doi 10.1109/TAFFC.2017.2736999)
}
"""Emotion -> the other words for it."""
NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})
MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {word: emotion for emotion, words in WORDS.items() for word in words}
)


def plain(word: str) -> str:
    """A word without what does not tell emotions apart: case, spaces around it, _ for a space, how its accents are
    written (NFC), and the zeros of a whole number that was stored as a fraction.

    >>> plain(" Pleasant_Surprise "), plain("2.0")
    ('pleasant surprise', '2')
    """
    text = " ".join(unicodedata.normalize("NFC", word).lower().replace("_", " ").split())
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def emotion_of(word: str, labels: Mapping[str, str] = NO_LABELS) -> str:
    """The emotion that a word stands for: by ``labels`` (of one corpus), else by the table; else it is one itself.

    A word fits a label as it is written, or else in `plain` form.

    >>> emotion_of("ANG"), emotion_of("Joy"), emotion_of("Frustrated"), emotion_of("joy", {"Joy": "amused"})
    ('angry', 'happy', 'frustrated', 'amused')
    """
    if word in labels:
        return labels[word]
    word = plain(word)
    by_plain = {plain(label): emotion for label, emotion in labels.items()} if labels else {}
    return by_plain.get(word) or MEANINGS.get(word, word)


def own_words(labels: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    """Words that ``labels`` (corpus -> word -> emotion) maps to themselves: they are emotions of their own, whatever
    the table says.

    >>> sorted(own_words({"mine": {"Joy": "joy", "ang": "angry"}}))
    ['joy']
    """
    pairs = ((plain(word), plain(emotion)) for meanings in labels.values() for word, emotion in meanings.items())
    return frozenset(word for word, emotion in pairs if word == emotion)


def named(word: str, apart: frozenset[str]) -> str:
    """The emotion that a word of the configuration names; those that are `own_words` are themselves.

    >>> named("Joy", frozenset()), named("Joy", frozenset({"joy"}))
    ('happy', 'joy')
    """
    return plain(word) if plain(word) in apart else emotion_of(word)


def as_word(value: object) -> object:
    """A scalar of YAML as the word that was written: 0 is "0", true is "true", null is "null"; a word as it is.

    >>> as_word(0), as_word(True), as_word(None), as_word("no")
    ('0', 'true', 'null', 'no')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if isinstance(value, int | float) else value
