"""The audit of a fold: what is on two sides of a split, or on none, before a GPU is used.

Levels: ``error`` the experiment cannot mean anything; ``leak`` its figures are too high, and everything made from it is
stamped LEAKY; ``note`` worth knowing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pyarrow as pa

from ser_ray.schema import SPLITS, Fold

Rows = Sequence[Mapping[str, Any]]


def audit(index: pa.Table, fold: Fold, emotions: Sequence[str]) -> dict[str, Any]:
    """What a reader of results has to know about the data of a fold; JSON types only.

    ``index`` is the labelled index that the fold was made from. The result holds ``leaky``, ``findings`` (level, what,
    detail) with the gravest first, and ``splits`` (utterances, speakers, minutes and a count per emotion of each).
    """
    columns = ["utterance_id", "speaker", "emotion", "duration", "audio_sha256"]
    rows = [row | {"split": fold.splits[row["utterance_id"]]} for row in index.select(columns).to_pylist()]
    splits = {split: _describe([row for row in rows if row["split"] == split], emotions) for split in SPLITS}
    findings = [*_absent_emotions(splits), *_scheme(fold), *_shared_speakers(rows), *_identical_audio(rows)]
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


def _absent_emotions(splits: Mapping[str, Mapping[str, Any]]) -> Iterable[dict[str, str]]:
    for split, description in splits.items():
        if absent := [emotion for emotion, n in description["emotions"].items() if n == 0]:
            consequence = "cannot be learned" if split == "train" else f"is not counted in the UAR of {split}"
            level = "error" if split == "train" else "note"
            yield _finding(level, f"emotion absent from {split}", f"{', '.join(absent)} {consequence}")


def _shared_speakers(rows: Rows) -> Iterable[dict[str, str]]:
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(speakers[one] & speakers[other]):
            yield _finding("leak", f"speakers shared by {one} and {other}", _some(shared))


def _identical_audio(rows: Rows) -> Iterable[dict[str, str]]:
    alike = defaultdict(list)
    for row in rows:
        alike[row["audio_sha256"]].append(row)
    groups = [sorted(group, key=lambda row: row["utterance_id"]) for group in alike.values() if len(group) > 1]
    kinds = {
        ("leak", "identical audio across splits"): lambda group: len({row["split"] for row in group}) > 1,
        ("note", "identical audio within a split"): lambda group: len({row["split"] for row in group}) == 1,
        ("note", "identical audio under different emotions"): lambda group: len({row["emotion"] for row in group}) > 1,
    }
    for (level, what), belongs in kinds.items():
        found = [" = ".join(row["utterance_id"] for row in group) for group in groups if belongs(group)]
        if found:
            yield _finding(level, what, _some(sorted(found)))


def _finding(level: str, what: str, detail: str) -> dict[str, str]:
    return {"level": level, "what": what, "detail": detail}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {', '.join(names[:5])}{more}"
