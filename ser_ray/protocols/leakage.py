"""The audit of every fold that is trained: leakage between splits and flaws of the data, before a GPU is used.

Levels: ``error``: the experiment is meaningless; ``leak``: its metrics are too high, and all results are stamped LEAKY;
``note``: worth knowing. Identical audio is detected by its digest, versions of one recording by
`ser_ray.speech.fingerprint`.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import combinations
from typing import Any, Final

import pyarrow as pa

from ser_ray.config import SearchSpace
from ser_ray.protocols import advice
from ser_ray.protocols.exclusion import flawed, recordings
from ser_ray.protocols.finals import more_dev, trained_folds
from ser_ray.protocols.findings import Finding, Group, finding, named, some
from ser_ray.protocols.folds import unheard
from ser_ray.protocols.task import Task
from ser_ray.protocols.voices import Voice, confounded, one_voice, shared_voices
from ser_ray.schema import SPLITS, Fold, is_known
from ser_ray.speech.matching import SameRecording

Rows = Sequence[Mapping[str, Any]]
NO_NOTES: Final[Mapping[str, str]] = {}
TOLD: Final = 3
"""Maximum number of folds, or of details, in a human-readable line."""

FEW_SPEAKERS: Final = 5
"""In dev and test: with fewer, intervals over speakers are so wide that few differences can be told from chance."""
SHIFT: Final = 0.2
"""Total variation distance between the emotions of two splits above which it is noted: a fifth of a split differs."""
ONE_LENGTH: Final = 0.25
"""A corpus looks cut or padded if at least this share of its utterances have exactly the same length. As recorded and
trimmed, fewer than one in twenty do (RAVDESS)."""
MANY: Final = 20
"""Minimum number of utterances of a corpus for a check of their lengths."""


def audit_search(
    space: SearchSpace, task: Task, pairs: Iterable[SameRecording] = (), overlaps: Iterable[str] = ()
) -> dict[str, Any]:
    """`audit` of every fold that a search trains, finals included. Raises UserError if a fold cannot be made."""
    notes = {}
    if space.experiment.label == "perceived" and (counts := unheard(task.index)):
        detail = ", ".join(f"{n} of {corpus}" for corpus, n in counts.items())
        notes["no listener ratings"] = f"{detail}: the intended emotion is used"
    pairs = list(pairs)
    if _knows_speakers(space):
        rows = task.index.select(["utterance_id", "speaker", "audio_sha256"]).to_pylist()
        notes["speakers are known"] = _enrolled_note(space, rows, pairs)
    folds, remedy = trained_folds(space, task.unsplit), more_dev(space, task.unsplit)
    result = audit(task.index, folds, task.emotions, pairs, overlaps, notes, remedy, task.excluded)
    return result | {"advice": [*advice.to_exclude(result), *advice.other_folds(space, task.unsplit, folds)]}


def audit(
    index: pa.Table,
    folds: Mapping[str, Fold],
    emotions: Sequence[str],
    pairs: Iterable[SameRecording] = (),
    overlaps: Iterable[str] = (),
    notes: Mapping[str, str] = NO_NOTES,
    remedy: str = "tune.final_folds: all",
    excluded: pa.Table | None = None,
) -> dict[str, Any]:
    """Audit the data of the folds that are trained; returns JSON types only.

    Args:
        index: the labelled index that the folds were made from.
        folds: name, such as ``fold 0`` -> fold; the experiment's own first.
        emotions: of the experiment.
        pairs: from `matching.same_recordings_in`; pairs that are not in the index are ignored.
        overlaps: a line for every backbone that was pre-trained on speech that is tested here.
        notes: further notes, what -> detail.
        remedy: what to set if dev has few speakers.
        excluded: utterances that the experiment leaves out, from `exclusion.without`. What they share with others
            still shows that two speakers are one voice.

    Returns:
        ``leaky`` (whether any fold leaks); ``findings`` (level, what, detail, groups), the most severe first;
        ``splits`` (utterances, speakers, minutes and a count per emotion) of the first fold; ``excluded``, and
        ``to_exclude``, what ``exclude: [duplicates, mislabelled]`` would leave out, each with the reason. With several
        folds also ``folds`` (name -> description), and each finding that is not about the data as a whole has ``folds``
        (name -> detail), the folds in which it holds.
    """
    columns = ["utterance_id", "corpus", "speaker", "emotion", "duration", "audio_sha256"]
    rows, pairs = index.select(columns).to_pylist(), list(pairs)
    out = excluded.select([*columns, "by", "reason"]).to_pylist() if excluded is not None else []
    voices = shared_voices([*rows, *out], pairs)
    by_fold: dict[str, list[Finding]] = {}
    own_splits: dict[str, Any] = {}
    speakers: dict[str, set[str]] = {split: set() for split in SPLITS}
    for name, fold in folds.items():  # one at a time: there may be a fold for every speaker
        split_rows = [row | {"split": fold.splits[row["utterance_id"]]} for row in rows]
        splits = _splits(split_rows, emotions)
        by_fold[name] = _audit_fold(split_rows, splits, fold, pairs, voices)
        own_splits = own_splits or splits
        for row in split_rows:
            speakers[row["split"]].add(row["speaker"])
    findings = [
        *(finding("leak", "a backbone was pre-trained on this", line) for line in overlaps),
        *_merged(by_fold),
        *_few_speakers(speakers, remedy),
        *_of_all_data(rows),
        *(finding("note", what, detail) for what, detail in notes.items()),
    ]
    findings.sort(key=lambda one: ("error", "leak", "note").index(one["level"]))
    several = {"folds": {name: fold.description for name, fold in folds.items()}} if len(folds) > 1 else {}
    return {
        "leaky": any(one["level"] == "leak" for one in findings),
        "findings": findings,
        "splits": own_splits,
        "to_exclude": _to_exclude(rows, pairs),
        "excluded": [named(row) | {"by": row["by"], "reason": row["reason"]} for row in out],
    } | several


# -- below: how it is done


def _knows_speakers(space: SearchSpace) -> bool:
    searched = space.search.get("head.speaker")
    return any(value != "none" for value in (space.experiment.head.speaker, *(searched.examples() if searched else ())))


def _enrolled_note(space: SearchSpace, rows: Rows, pairs: Sequence[SameRecording]) -> str:
    """What `Protocol.enrolment` uses of dev and test, and how many utterances it would answer with their own copies."""
    counts = ", ".join(map(str, space.experiment.protocol.enrolment.recordings))
    said = (
        f"beside the headline, speakers of dev and test are known by recordings without labels ({counts}); no "
        "recording is answered with itself, and nothing is chosen by it"
    )
    copies = sum(
        number
        for group in recordings(rows, pairs)
        for number in Counter(row["speaker"] for row in group).values()
        if number > 1
    )
    copied = f"; {copies} utterances have a copy of the same speaker: leave it out with experiment.exclude: duplicates"
    return said + (copied if copies else "")


def _of_all_data(rows: Rows) -> list[Finding]:
    return [*_few_voices(rows), *confounded(rows), *_one_length(rows)]


def _to_exclude(rows: Rows, pairs: Sequence[SameRecording]) -> list[dict[str, str]]:
    flaws = flawed(rows, pairs)
    return [named(row) | flaws[i]._asdict() for row in rows if (i := row["utterance_id"]) in flaws]


def _audit_fold(
    rows: Rows,
    splits: Mapping[str, Mapping[str, Any]],
    fold: Fold,
    pairs: Sequence[SameRecording],
    voices: Sequence[Voice],
) -> list[Finding]:
    return [
        *_absent_emotions(splits, fold.common_emotions),
        *_scheme(rows, fold),
        *_shared_speakers(rows),
        *_same_audio(_identical(rows), "identical audio", " = "),
        *_same_audio(_alike(rows, pairs), "versions of one recording", " ~ "),
        *one_voice(rows, voices),
        *_shifted_emotions(splits),
        *_untrained_corpora(rows),
        *_one_voice_tested(rows),
    ]


def _merged(by_fold: Mapping[str, Sequence[Finding]]) -> Iterable[Finding]:
    """The findings of all folds, each once, with the folds that it holds in."""
    found: dict[tuple[str, str], dict[str, Finding]] = defaultdict(dict)
    for name, findings in by_fold.items():
        for one in findings:
            found[one["level"], one["what"]][name] = one
    for (level, what), held in found.items():
        details = {name: one["detail"] for name, one in held.items()}
        several = {"folds": details} if len(by_fold) > 1 else {}
        groups = _groups({name: one.get("groups", ()) for name, one in held.items()}, len(by_fold) > 1)
        yield finding(level, what, _in_folds(details, len(by_fold)), groups) | several


def _groups(by_fold: Mapping[str, Iterable[Group]], is_told: bool) -> list[Group]:
    """The groups of all folds, each once; with ``is_told`` also the folds that have it."""
    folds: dict[str, list[str]] = defaultdict(list)
    for name, groups in by_fold.items():
        for group in groups:
            folds[json.dumps(group)].append(name)
    return [json.loads(group) | ({"folds": names} if is_told else {}) for group, names in folds.items()]


def _in_folds(held: Mapping[str, str], folds: int) -> str:
    """One line: every detail with its folds, or the detail alone if it is the same in all folds."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, detail in held.items():
        names[detail].append(name)
    if len(names) == 1 and len(held) == folds:
        return next(iter(names))
    lines = [f"{_some_folds(where)}: {detail}" for detail, where in names.items()]
    more = f"; and {len(lines) - TOLD} more in audit.json" if len(lines) > TOLD else ""
    return "; ".join(lines[:TOLD]) + more


def _some_folds(names: Sequence[str]) -> str:
    return " / ".join(names) if len(names) <= TOLD else f"{names[0]} and {len(names) - 1} more"


def _splits(rows: Rows, emotions: Sequence[str]) -> dict[str, Any]:
    return {split: _describe([row for row in rows if row["split"] == split], emotions) for split in SPLITS}


def _describe(rows: Rows, emotions: Sequence[str]) -> dict[str, Any]:
    counts = Counter(row["emotion"] for row in rows)
    return {
        "utterances": len(rows),
        "speakers": len({row["speaker"] for row in rows if is_known(row["speaker"])}),
        "minutes": sum(row["duration"] for row in rows) / 60,
        "emotions": {emotion: counts[emotion] for emotion in emotions},
    }


def _scheme(rows: Rows, fold: Fold) -> list[Finding]:
    unknown = not all(is_known(row["speaker"]) for row in rows)
    what = "test may share speakers with train, not all are known" if unknown else ""
    what = what or "the protocol shares speakers by design"
    return [finding("leak", what, fold.description)] if fold.leaky else []


def _absent_emotions(splits: Mapping[str, Mapping[str, Any]], by_design: bool) -> Iterable[Finding]:
    emotions = splits["train"]["emotions"] if by_design else ()
    nowhere = [emotion for emotion in emotions if not any(part["emotions"][emotion] for part in splits.values())]
    if nowhere:
        yield finding(
            "note", "emotion not common to train and test", f"{', '.join(nowhere)}: neither trained nor scored"
        )
    for split, description in splits.items():
        if absent := [emotion for emotion, n in description["emotions"].items() if n == 0 and emotion not in nowhere]:
            consequence = "cannot be learned" if split == "train" else f"is not counted in the UAR of {split}"
            level = "error" if split == "train" else "note"
            yield finding(level, f"emotion absent from {split}", f"{', '.join(absent)} {consequence}")


def _shared_speakers(rows: Rows) -> Iterable[Finding]:
    speakers = {split: {row["speaker"] for row in rows if row["split"] == split} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(speakers[one] & speakers[other]):
            groups = [{"speakers": [speaker]} for speaker in shared]
            yield finding("leak", f"speakers shared by {one} and {other}", some(shared), groups)


def _identical(rows: Rows) -> list[Rows]:
    """Groups of utterances whose decoded audio is bit-identical."""
    alike = defaultdict(list)
    for row in rows:
        alike[row["audio_sha256"]].append(row)
    return [group for group in alike.values() if len(group) > 1]


def _alike(rows: Rows, pairs: Iterable[SameRecording]) -> list[Rows]:
    """Pairs of utterances that are versions of one recording, but not identical."""
    row_of = {row["utterance_id"]: row for row in rows}
    known = [[row_of[pair.one], row_of[pair.other]] for pair in pairs if {pair.one, pair.other} <= row_of.keys()]
    return [[one, other] for one, other in known if one["audio_sha256"] != other["audio_sha256"]]


def _same_audio(groups: Sequence[Rows], what: str, sign: str) -> Iterable[Finding]:
    kinds = (
        ("leak", "across splits", "split", True),
        ("note", "within a split", "split", False),
        ("note", "under different emotions", "emotion", True),
        ("note", "under different speakers", "speaker", True),
    )
    for level, where, key, differs in kinds:
        chosen = [group for group in groups if (len({row[key] for row in group}) > 1) == differs]
        if chosen:
            ordered = [sorted(group, key=lambda row: str(row["utterance_id"])) for group in chosen]
            joined = {sign.join(row["utterance_id"] for row in group): group for group in ordered}
            members = [{"utterances": [named(row) for row in joined[name]]} for name in sorted(joined)]
            yield finding(level, f"{what} {where}", some(sorted(joined)), members)


def _few_speakers(speakers: Mapping[str, Set[str]], remedy: str) -> Iterable[Finding]:
    """Over all folds together, since the metrics of the finals are."""
    wide = {1: "1 speaker: intervals are over utterances, and say nothing about other speakers"}
    for split in SPLITS[1:]:
        if (number := len(speakers[split])) < FEW_SPEAKERS:
            what = f"{'one speaker' if number == 1 else 'few speakers'} in {split}"
            detail = wide.get(number, f"{number} speakers: intervals over speakers are wide")
            chooses = f"; few speakers decide between the trials: use {remedy}"
            yield finding("note", what, detail + (chooses if split == "dev" else ""))


def _few_voices(rows: Rows) -> Iterable[Finding]:
    voices = defaultdict(set)
    for row in rows:
        voices[row["corpus"]].add(row["speaker"])
    for corpus, speakers in sorted(voices.items()):
        if len(speakers) < len(SPLITS):
            detail = f"{len(speakers)}: too few for train, dev and test; its metrics say nothing about other speakers"
            yield finding("note", f"too few speakers in {corpus}", detail)


def _untrained_corpora(rows: Rows) -> Iterable[Finding]:
    """Corpora in dev, where they decide between the trials, but not in train. A held-out corpus is in test alone."""
    corpora = {split: {row["corpus"] for row in rows if row["split"] == split} for split in SPLITS}
    if missing := sorted(corpora["dev"] - corpora["train"]):
        detail = (
            f"{', '.join(missing)}: in dev, but no trial is trained on it; another protocol.fold may have it in train"
        )
        yield finding("note", "corpus absent from train", detail)


def _one_voice_tested(rows: Rows) -> Iterable[Finding]:
    """One of several speakers with most of test: an interval over speakers depends on whether that one is drawn."""
    counts = Counter(row["speaker"] for row in rows if row["split"] == "test")
    (speaker, most), total = counts.most_common(1)[0], sum(counts.values())
    if len(counts) > 1 and most > total / 2:
        detail = (
            f"{speaker}: {most} of {total} utterances; pooled metrics are mostly that speaker's; see those by corpus"
        )
        yield finding("note", "one speaker is most of test", detail)


def _shifted_emotions(splits: Mapping[str, Mapping[str, Any]]) -> Iterable[Finding]:
    """Total variation distance: half the sum of the absolute differences between two distributions."""
    train = _shares(splits["train"])
    for split in SPLITS[1:]:
        shares = _shares(splits[split])
        if sum(abs(shares[emotion] - train[emotion]) for emotion in train) / 2 > SHIFT:
            most = max(train, key=lambda emotion: shares[emotion] - train[emotion])
            detail = f"most of all, {most}: {train[most]:.0%} of train, {shares[most]:.0%} of {split}"
            yield finding("note", f"emotions are distributed differently in {split} than in train", detail)


def _shares(split: Mapping[str, Any]) -> dict[str, float]:
    return {emotion: n / max(split["utterances"], 1) for emotion, n in split["emotions"].items()}


def _one_length(rows: Rows) -> Iterable[Finding]:
    durations = defaultdict(list)
    for row in rows:
        durations[row["corpus"]].append(row["duration"])
    for corpus, seconds in sorted(durations.items()):
        commonest, n = Counter(seconds).most_common(1)[0]
        if len(seconds) >= MANY and n >= ONE_LENGTH * len(seconds):
            detail = f"{n} of {len(seconds)} last exactly {commonest:g} s: speech was cut off, or silence added"
            yield finding("note", f"{corpus} looks cut or padded to one length", detail)
