"""What an embedded backbone was pre-trained on that a search would test it on; for the audit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from ser_ray.config import fingerprint
from ser_ray.corpora import synthetic
from ser_ray.disk import read_json

FILE: Final = "pretraining.json"
"""Beside the weights of an embedded backbone: ``words``, the lexicon of each language, and ``speakers``, a `voice_key`
for each. Every sentence that it was trained on has words of one lexicon only."""


def pretraining_overlap(backbones: Iterable[str], corpora: Iterable[str]) -> list[str]:
    """A line for every embedded backbone that was trained on a speaker, or could have been on a sentence, of the
    synthetic corpus; there should be none. Other corpora have no part in that training."""
    from ser_ray.models.pretrained import embedded_directory  # imports torch, which the driver does not need

    lines = []
    for name in backbones if "synthetic" in corpora else ():
        directory = embedded_directory(name)
        if directory is None:
            continue
        known = read_json(directory / FILE)
        lexicons = [set(lexicon) for lexicon in known["words"].values()]
        sentences = [s for s in synthetic.SENTENCES if any(set(words(s)) <= lexicon for lexicon in lexicons)]
        voices = {voice_key(synthetic.draw_speaker(0, number).formants) for number in range(synthetic.SPEAKERS)}
        shared = voices & set(known["speakers"])
        if sentences or shared:
            lines.append(f"{name}: {len(sentences)} sentences, {len(shared)} speakers of the synthetic corpus")
    return lines


def words(text: str) -> list[str]:
    """The words of a text, whatever their case, spaces and punctuation.

    >>> words("Well: there are four  books!")
    ['well', 'there', 'are', 'four', 'books']
    """
    return re.sub(r"[\W_]+", " ", text.casefold()).split()


def voice_key(formants: Sequence[float]) -> str:
    """Identifies a made-up speaker by the resonances of the vocal tract."""
    return fingerprint(list(formants))
