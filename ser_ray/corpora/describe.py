"""Counts of a corpus, and how they differ from the published ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ser_ray.corpora import module_of
from ser_ray.schema import Utterance


def describe(utterances: Sequence[Utterance], durations: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Counts of utterances, speakers and emotions; and hours if ``durations`` (utterance id -> seconds) are given.

    >>> describe([Utterance("a/1", "a", "a/x", "sad", "1.wav")])
    {'utterances': 1, 'speakers': 1, 'emotions': {'sad': 1}}
    """
    counts: dict[str, Any] = {
        "utterances": len(utterances),
        "speakers": len({utterance.speaker for utterance in utterances}),
        "emotions": dict(sorted(Counter(utterance.emotion for utterance in utterances).items())),
    }
    if durations is not None:
        counts["hours"] = sum(durations[utterance.utterance_id] for utterance in utterances) / 3600
    return counts


def speech_of(corpus: str) -> str:
    """``acted`` or ``synthetic``, as the corpus's module says; empty where it is unknown, as for a table.

    >>> speech_of("ravdess"), speech_of("synthetic"), speech_of("mine")
    ('acted', 'synthetic', '')
    """
    return str(getattr(module_of(corpus), "SPEECH", ""))


def differences(corpus: str, counts: Mapping[str, Any]) -> list[str]:
    """Descriptions of how the counts of `describe` differ from the published ones; none if nothing was published.

    >>> differences("tess", {"utterances": 2799, "speakers": 2, "emotions": {"angry": 400}})[:2]
    ['2799 utterances of 2800 published', '0 disgust of 400']
    """
    published = getattr(module_of(corpus), "PUBLISHED", None)
    if published is None:
        return []
    lines = [
        f"{counts[what]} {what} of {published[what]} published"
        for what in ("utterances", "speakers")
        if counts[what] != published[what]
    ]
    emotions = dict.fromkeys(published["emotions"], 0) | dict(counts["emotions"])
    expected = dict.fromkeys(emotions, 0) | published["emotions"]
    return lines + [
        f"{n} {emotion} of {expected[emotion]}" for emotion, n in emotions.items() if n != expected[emotion]
    ]
