"""What the audit finds about speakers: two names of one voice, and voices that give the emotion away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Final

from ser_ray.protocols.exclusion import recordings
from ser_ray.protocols.findings import Finding, finding, some
from ser_ray.speech.matching import SameRecording

Rows = Sequence[Mapping[str, Any]]

SHARED: Final = 3
"""Recordings that two speakers share, from which on they may be one voice: one or two can be misplaced files."""
SHARE: Final = 0.1
"""And at least this share of the recordings of the one with fewer: a large corpus has more misplaced files."""
MANY_SPEAKERS: Final = 20
"""A recording under more names than this, such as a beep, says nothing about any two of them."""
CONFOUNDED: Final = 0.5
"""Share of speakers with one emotion above which emotion and speaker are confounded: most speakers."""

Voice = tuple[str, str, int]
"""Two speakers, and how many recordings they share."""


def shared_voices(rows: Rows, pairs: Iterable[SameRecording]) -> list[Voice]:
    """Pairs of speakers that share so many recordings that they are one voice."""
    shared: Counter[tuple[str, str]] = Counter()
    for group in recordings(rows, pairs):
        speakers = sorted({row["speaker"] for row in group})
        if len(speakers) <= MANY_SPEAKERS:
            shared.update(combinations(speakers, 2))
    own = Counter(row["speaker"] for row in rows)
    return [
        (one, other, number)
        for (one, other), number in sorted(shared.items())
        if number >= SHARED and number >= SHARE * min(own[one], own[other])
    ]


def one_voice(rows: Rows, voices: Iterable[Voice]) -> Iterable[Finding]:
    """Of a fold: whether the two names of one voice are in different splits. ``rows`` have the column split."""
    splits = defaultdict(set)
    for row in rows:
        splits[row["speaker"]].add(row["split"])
    for level, where, differs in (("leak", "across splits", True), ("note", "within a split", False)):
        chosen = [
            voice
            for voice in voices
            if voice[0] in splits and voice[1] in splits and (len(splits[voice[0]] | splits[voice[1]]) > 1) == differs
        ]
        if chosen:
            names = [f"{one} = {other} ({number} recordings shared)" for one, other, number in chosen]
            advice = "; give both one name in the table, or exclude one"
            groups = [{"speakers": [one, other]} for one, other, _ in chosen]
            yield finding(level, f"two speakers are one voice {where}", some(names) + advice, groups)


def confounded(rows: Rows) -> Iterable[Finding]:
    """Corpora most of whose speakers have one emotion only. Speakers of one utterance cannot have two."""
    emotions: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        emotions[row["corpus"]][row["speaker"]][row["emotion"]] += 1
    for corpus, speakers in sorted(emotions.items()):
        several = [counts for counts in speakers.values() if counts.total() > 1]
        one = sorted(speaker for speaker, counts in speakers.items() if len(counts) == 1)
        is_said = len({emotion for counts in speakers.values() for emotion in counts}) > 1
        if is_said and sum(len(counts) == 1 for counts in several) > CONFOUNDED * len(several):
            detail = (
                f"{len(one)} of {len(speakers)} speakers have one emotion only: a model can learn voices in place of "
                "emotions"
            )
            groups = [{"speakers": [speaker]} for speaker in one]
            yield finding("note", f"emotion and speaker are confounded in {corpus}", detail, groups)
