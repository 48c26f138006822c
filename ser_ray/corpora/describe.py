"""Counts of a corpus, and how they differ from the published ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ser_ray.config import Experiment
from ser_ray.corpora import module_of
from ser_ray.corpora.rows import DIVIDED
from ser_ray.schema import EMOTIONS, TIE, Rejected, Utterance, is_known, shortened

MOST_WORDS: Final = 20
"""Maximum number of words in a line about them: more are free text, not emotions."""


def describe(utterances: Sequence[Utterance], durations: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Counts of utterances, speakers and emotions; and hours if ``durations`` (utterance id -> seconds) are given.

    >>> describe([Utterance("a/1", "a", "a/x", "sad", "1.wav")])
    {'utterances': 1, 'speakers': 1, 'emotions': {'sad': 1}}
    """
    counts: dict[str, Any] = {
        "utterances": len(utterances),
        "speakers": len({utterance.speaker for utterance in utterances if is_known(utterance.speaker)}),
        "emotions": dict(sorted(Counter(utterance.emotion for utterance in utterances).items())),
    }
    if durations is not None:
        counts["hours"] = sum(durations[utterance.utterance_id] for utterance in utterances) / 3600
    return counts


def left_out(corpus: str, utterances: Sequence[Utterance], experiment: Experiment) -> str:
    """A line that counts the utterances of no class of an experiment, by their words, and says how to use them; empty
    where there are none, and for a corpus without labels. Known emotions that an experiment left out when it named its
    own are left out on purpose."""
    if corpus in experiment.distil.unlabelled:
        return ""
    heard = experiment.label == "perceived"
    counts = Counter((utterance.perceived if heard else None) or utterance.emotion for utterance in utterances)
    used = {*experiment.emotions, *experiment.merge, TIE}
    used |= set(EMOTIONS) if "emotions" in experiment.model_fields_set else set()
    unused = {word: n for word, n in counts.most_common() if word not in used}
    if not unused:
        return ""
    shown = list(unused)[:MOST_WORDS]
    more = f" and {len(unused) - len(shown)} other words" if len(unused) > len(shown) else ""
    counted = ", ".join(f"{shortened(word)} {unused[word]}" for word in shown)
    asked = ", ".join(f"{_yaml(word)}: EMOTION" for word in shown if word == shortened(word))
    key = "merge: " if module_of(corpus) else f"labels: {{{_yaml(corpus)}: "
    return (
        f"{corpus}: {sum(unused.values())} of {len(utterances)} utterances are of no class of experiment.emotions: "
        f"{counted}{more}; add the word there, or say what it means: "
        f"{key}{{{asked}}}{'' if module_of(corpus) else '}'}"
    )


def raters(corpus: str, utterances: Sequence[Utterance], rejected: Sequence[Rejected]) -> str:
    """A line about the recordings of a table that its raters gave different emotions; empty where there are none."""
    shares = [utterance.agreement for utterance in utterances if utterance.agreement is not None]
    split = sum(share < 1 for share in shares)
    divided = sum(DIVIDED in one.reason for one in rejected)
    if module_of(corpus) or not split + divided:
        return ""
    return (
        f"{corpus}: raters gave different emotions to {split + divided} of {len(shares) + divided} recordings: the "
        f"emotion with the most votes is used; {divided} without one are left out"
    )


def speech_of(corpus: str) -> str:
    """``acted`` or ``synthetic``, as the corpus's module says; empty where it is unknown, as for a table.

    >>> speech_of("ravdess"), speech_of("synthetic"), speech_of("mine")
    ('acted', 'synthetic', '')
    """
    return str(getattr(module_of(corpus), "SPEECH", ""))


def licence_of(corpus: str) -> str:
    """The licence of a corpus, as its module says; empty where that is not known here.

    >>> licence_of("ravdess"), licence_of("mine")
    ('CC BY-NC-SA 4.0', '')
    """
    return str(getattr(module_of(corpus), "LICENCE", ""))


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


def _yaml(word: str) -> str:
    """A word as YAML has it inside of braces."""
    return word if re.fullmatch(r"\w(?:[\w .-]*\w)?", word) else json.dumps(word, ensure_ascii=False)
