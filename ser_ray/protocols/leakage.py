"""The audit of a fold: what is on two sides of a split, or on none, before a GPU is used.

Levels: ``error`` the experiment cannot mean anything; ``leak`` its figures are too high, and everything made from it is
stamped LEAKY; ``note`` worth knowing. Where the audio is the same is found by its digest, or told by
`ser_ray.speech.fingerprint`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Final

import pyarrow as pa

from ser_ray.schema import SPLITS, Fold
from ser_ray.speech.fingerprint import SameTake

Rows = Sequence[Mapping[str, Any]]

FEW_SPEAKERS: Final = 5
"""In test: with fewer, an interval over speakers is so wide that few differences can be told from chance."""
SHIFT: Final = 0.2
"""Total variation between the emotions of two splits from which it is noted: a fifth of one split is otherwise."""
ONE_LENGTH: Final = 0.25
"""Share of a corpus's utterances of exactly the same length from which it looks cut or padded; as recorded and trimmed,
fewer than one in twenty are (RAVDESS)."""
MANY: Final = 20
"""Utterances a corpus has to have before its lengths are judged."""


def audit(
    index: pa.Table, fold: Fold, emotions: Sequence[str], takes: Iterable[SameTake] = (), heard: Iterable[str] = ()
) -> dict[str, Any]:
    """What a reader of results has to know about the data of a fold; JSON types only.

    ``index`` is the labelled index that the fold was made from, ``takes`` what `fingerprint.same_takes_in` found; pairs
    that the index does not hold are passed over; ``heard``: a line for every backbone that was pre-trained on what is
    tested here. The result holds ``leaky``, ``findings`` (level, what, detail) with
    the gravest first, and ``splits`` (utterances, speakers, minutes and a count per emotion of each).
    """
    columns = ["utterance_id", "corpus", "speaker", "emotion", "duration", "audio_sha256"]
    rows = [row | {"split": fold.splits[row["utterance_id"]]} for row in index.select(columns).to_pylist()]
    splits = {split: _describe([row for row in rows if row["split"] == split], emotions) for split in SPLITS}
    findings = [
        *_absent_emotions(splits, fold.common_emotions),
        *_scheme(fold),
        *(_finding("leak", "a backbone was pre-trained on this", line) for line in heard),
        *_shared_speakers(rows),
        *_same_audio(_identical(rows), "identical audio", " = "),
        *_same_audio(_alike(rows, takes), "the same take", " ~ "),
        *_few_speakers(splits["test"]["speakers"]),
        *_few_voices(rows),
        *_shifted_emotions(splits),
        *_one_length(rows),
    ]
    findings.sort(key=lambda finding: ("error", "leak", "note").index(finding["level"]))
    return {
        "leaky": any(finding["level"] == "leak" for finding in findings),
        "findings": findings,
        "splits": splits,
    }


def _describe(rows: Rows, emotions: Sequence[str]) -> dict[str, Any]:
    counts = Counter(row["emotion"] for row in rows)
    return {
        "utterances": len(rows),
        "speakers": len({row["speaker"] for row in rows}),
        "minutes": sum(row["duration"] for row in rows) / 60,
        "emotions": {emotion: counts[emotion] for emotion in emotions},
    }


def _scheme(fold: Fold) -> list[dict[str, str]]:
    return [_finding("leak", "the protocol shares speakers by design", fold.description)] if fold.leaky else []


def _absent_emotions(splits: Mapping[str, Mapping[str, Any]], by_design: bool) -> Iterable[dict[str, str]]:
    emotions = splits["train"]["emotions"] if by_design else ()
    nowhere = [emotion for emotion in emotions if not any(part["emotions"][emotion] for part in splits.values())]
    if nowhere:
        yield _finding(
            "note", "emotion not common to train and test", f"{', '.join(nowhere)}: not learned, not counted"
        )
    for split, description in splits.items():
        if absent := [emotion for emotion, n in description["emotions"].items() if n == 0 and emotion not in nowhere]:
            consequence = "cannot be learned" if split == "train" else f"is not counted in the UAR of {split}"
            level = "error" if split == "train" else "note"
            yield _finding(level, f"emotion absent from {split}", f"{', '.join(absent)} {consequence}")


def _shared_speakers(rows: Rows) -> Iterable[dict[str, str]]:
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(speakers[one] & speakers[other]):
            yield _finding("leak", f"speakers shared by {one} and {other}", _some(shared))


def _identical(rows: Rows) -> list[Rows]:
    """Utterances whose decoded audio is the same to the last bit."""
    alike = defaultdict(list)
    for row in rows:
        alike[row["audio_sha256"]].append(row)
    return [group for group in alike.values() if len(group) > 1]


def _alike(rows: Rows, takes: Iterable[SameTake]) -> list[Rows]:
    """Pairs of utterances that are versions of one take, but not identical."""
    row_of = {row["utterance_id"]: row for row in rows}
    pairs = [[row_of[take.one], row_of[take.other]] for take in takes if {take.one, take.other} <= row_of.keys()]
    return [[one, other] for one, other in pairs if one["audio_sha256"] != other["audio_sha256"]]


def _same_audio(groups: Sequence[Rows], what: str, sign: str) -> Iterable[dict[str, str]]:
    kinds = (
        ("leak", "across splits", "split", True),
        ("note", "within a split", "split", False),
        ("note", "under different emotions", "emotion", True),
        ("note", "under different speakers", "speaker", True),
    )
    for level, where, key, differs in kinds:
        found = [group for group in groups if (len({row[key] for row in group}) > 1) == differs]
        if found:
            names = sorted(sign.join(sorted(row["utterance_id"] for row in group)) for group in found)
            yield _finding(level, f"{what} {where}", _some(names))


def _few_speakers(speakers: int) -> Iterable[dict[str, str]]:
    if speakers == 1:
        detail = "intervals are over its utterances, and say nothing about other speakers"
        yield _finding("note", "one speaker in test", detail)
    elif speakers < FEW_SPEAKERS:
        yield _finding("note", "few speakers in test", f"{speakers}: intervals over speakers will be wide")


def _few_voices(rows: Rows) -> Iterable[dict[str, str]]:
    voices = defaultdict(set)
    for row in rows:
        voices[row["corpus"]].add(row["speaker"])
    for corpus, speakers in sorted(voices.items()):
        if len(speakers) < len(SPLITS):
            detail = (
                f"{len(speakers)}: train, dev and test cannot have a voice each; its figures tell of no other speaker"
            )
            yield _finding("note", f"too few speakers in {corpus}", detail)


def _shifted_emotions(splits: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    """Total variation: half the sum of the differences between two distributions."""
    train = _shares(splits["train"])
    for split in SPLITS[1:]:
        shares = _shares(splits[split])
        if sum(abs(shares[emotion] - train[emotion]) for emotion in train) / 2 > SHIFT:
            most = max(train, key=lambda emotion: shares[emotion] - train[emotion])
            detail = f"most of all {most}: {train[most]:.0%} of train, {shares[most]:.0%} of {split}"
            yield _finding("note", f"emotions are distributed otherwise in {split} than in train", detail)


def _shares(split: Mapping[str, Any]) -> dict[str, float]:
    return {emotion: n / max(split["utterances"], 1) for emotion, n in split["emotions"].items()}


def _one_length(rows: Rows) -> Iterable[dict[str, str]]:
    durations = defaultdict(list)
    for row in rows:
        durations[row["corpus"]].append(row["duration"])
    for corpus, seconds in sorted(durations.items()):
        commonest, n = Counter(seconds).most_common(1)[0]
        if len(seconds) >= MANY and n >= ONE_LENGTH * len(seconds):
            detail = f"{n} of {len(seconds)} last exactly {commonest:g} s: speech is lost, or silence added"
            yield _finding("note", f"{corpus} looks cut or padded to one length", detail)


def _finding(level: str, what: str, detail: str) -> dict[str, str]:
    return {"level": level, "what": what, "detail": detail}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {', '.join(names[:5])}{more}"
