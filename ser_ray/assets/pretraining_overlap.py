"""Overlap of an embedded backbone's training speech with the speech that a search tests it on; for the audit."""

from __future__ import annotations

from collections.abc import Iterable

from ser_ray.assets import speech
from ser_ray.corpora import synthetic
from ser_ray.disk import read_json


def pretraining_overlap(backbones: Iterable[str], corpora: Iterable[str]) -> list[str]:
    """A line for every embedded backbone that was trained on a speaker of the synthetic corpus, or could have been
    trained on one of its sentences; there should be none. Other corpora cannot overlap with that training."""
    from ser_ray.models.backbones import embedded_directory  # imports torch, which not every caller needs

    lines = []
    for name in backbones if "synthetic" in corpora else ():
        directory = embedded_directory(name)
        if directory is None:
            continue
        seed = read_json(directory / "recipe.json")["seed"]
        sentences = [sentence for sentence in synthetic.SENTENCES if speech.can_say(sentence)]
        voices = {synthetic.draw_speaker(0, number).formants for number in range(synthetic.SPEAKERS)}
        shared = voices & {speech.draw_speaker(seed, number).formants for number in range(speech.SPEAKERS)}
        if sentences or shared:
            lines.append(f"{name}: {len(sentences)} sentences, {len(shared)} speakers of the synthetic corpus")
    return lines
