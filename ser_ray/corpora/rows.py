"""Rows that describe recordings -> utterances: what a table and every other list of recordings share.

Several rows of one recording (the same path, start and end) are the votes of its raters if the table has a column
``rater``, or a recording has three rows or more. The emotion with the most votes is taken, and the share of the votes
that it has is its ``agreement``. Where two emotions share the most votes the recording is left out. Otherwise two rows
of one recording are the same row twice, or an error: they contradict each other.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from ser_ray.config.words import emotion_of
from ser_ray.schema import Rejected, UserError, Utterance, first_few, shortened, unknown_speaker

REQUIRED: Final = ("path", "speaker", "emotion")
OPTIONAL: Final = ("split", "text", "language", "gender", "start", "end", "rater")
COLUMNS: Final = REQUIRED + OPTIONAL
SPLITS: Final = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "development": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
    "eval": "test",
}
"""Common names of the splits."""
NO_VALUE: Final = frozenset({"", "nan", "NaN", "NaT", "<NA>"})
"""How pandas writes that there is no value."""
NOT_GIVEN: Final = frozenset({"none", "null", "na", "n/a"})
"""The same in other programs: in an optional column, in small or capital letters."""
NOT_KNOWN: Final = frozenset({"unknown", "unk", "none", "null", "n/a"})
"""Ways to say that the speaker is not known. Not NA, which may be somebody's initials."""
VOTES: Final = 3
"""As many rows of one recording are votes without a column ``rater``: of two that differ, none has a majority."""

MOST_NAMED: Final = 4
"""Maximum number of rows or emotions in a reason."""
DIVIDED: Final = "the raters are divided, no emotion has more votes than every other"
"""Why a recording is left out."""

Row = tuple[Mapping[str, str], str]
"""The columns as text, empty where there is no value, and where the row is, such as ``line 3``."""
Recording = tuple[str, float | None, float | None]
"""Path, start, end."""


def utterances_of(
    name: str, rows: Iterable[Row], labels: Mapping[str, str], folder: Path, source: object
) -> tuple[list[Utterance], list[Rejected]]:
    """The utterances of the corpus ``name``, sorted by id, and the rows that are not used, with reasons.

    ``labels`` maps words of the column emotion to emotions; for other words see `ser_ray.config.words`. Paths are
    relative to ``folder``. ``source`` is what the rows are from, for messages.

    Raises UserError, naming both, for two rows that contradict each other.
    """
    meaning = cache(lambda word: emotion_of(word, labels))
    known: dict[Recording, list[_Checked]] = {}
    rejected: list[Rejected] = []
    for row, where in rows:
        try:
            checked = _checked(name, row, where, meaning, folder)
        except ValueError as reason:
            rejected.append(Rejected(row["path"] or where, f"{where}: {reason}"))
            continue
        known.setdefault(checked.recording, []).append(checked)
    voted = any(one.rater or len(several) >= VOTES for several in known.values() for one in several)
    id_of = _ids(name, list(known))
    utterances = []
    for recording, several in known.items():
        _agree(several, source)
        votes, again = _votes(several, source) if voted else _one(several, source)
        rejected += [Rejected(one.path, f"{one.where}: the same utterance again") for one in again]
        if isinstance(found := _elected(votes), str):
            rejected.append(Rejected(recording[0], f"{_some([vote.where for vote in votes])}: {found}"))
            continue
        emotion, share = found
        utterances.append(_utterance(name, id_of[recording], several, emotion, share if voted else None))
    return sorted(utterances, key=lambda utterance: utterance.utterance_id), rejected


def example_of(rejected: Sequence[Rejected]) -> str:
    """For a message that nothing can be used: the first that is not used, and why; empty if there is none."""
    return f", such as {shortened(rejected[0].path)}: {shortened(rejected[0].reason, 160)}" if rejected else ""


# -- below: how it is done


@dataclass(frozen=True)
class _Checked:
    """A row whose values fit, each by itself."""

    where: str
    path: str
    start: float | None
    end: float | None
    emotion: str
    speaker: str
    """Empty if not known."""
    split: str
    text: str
    language: str
    gender: str
    rater: str

    @property
    def recording(self) -> Recording:
        return self.path, self.start, self.end


def _checked(name: str, row: Mapping[str, str], where: str, meaning: Callable[[str], str], folder: Path) -> _Checked:
    for column in ("path", "emotion"):
        if row[column] in NO_VALUE:
            raise ValueError(f"no {column}")
    if not (emotion := meaning(row["emotion"])):  # a word of spaces or underscores alone
        raise ValueError("no emotion")
    given = {column: _given(row.get(column, "")) for column in OPTIONAL}
    split = given["split"].lower()
    if split and split not in SPLITS:
        raise ValueError(f"split {shortened(repr(given['split']))} is not one of train, dev, test")
    start, end = _seconds(given, "start"), _seconds(given, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"ends at {end:g} s, before it begins at {start or 0:g} s")
    if not os.path.isfile(folder / row["path"]):  # noqa: PTH113  (false, not an error, for an impossible name)
        raise ValueError("no such file")
    path = Path(row["path"]).as_posix()
    speaker = row["speaker"]
    is_known = speaker not in NO_VALUE and speaker.lower() not in NOT_KNOWN
    return _Checked(
        where=where,
        path=path,
        start=start,
        end=end,
        emotion=emotion,
        speaker=f"{name}/{speaker}" if is_known else "",
        split=SPLITS[split] if split else "",
        **{column: given[column] for column in ("text", "language", "gender", "rater")},
    )


def _given(text: str) -> str:
    return "" if text in NO_VALUE or text.lower() in NOT_GIVEN else text


_CLOCK: Final = re.compile(r"(?:(\d+) days?,? *(?:\+)?)?(\d+):(\d\d):(\d\d(?:\.\d+)?)")
"""How pandas and Python write a length of time: ``0 days 00:00:01.500000``, ``0:00:01.5``."""


def _seconds(row: Mapping[str, str], column: str) -> float | None:
    text = row[column]
    if not text:
        return None
    try:
        clock = _CLOCK.fullmatch(text)
        days, hours, minutes, rest = (float(part or 0) for part in clock.groups()) if clock else (0, 0, 0, float(text))
        seconds = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{column} {shortened(repr(text))} is not a time in seconds")
    return seconds


def _agree(several: Sequence[_Checked], source: object) -> None:
    """Raise UserError for rows of one recording that differ in what no rater votes on."""
    for column in ("speaker", "split", "gender", "language"):
        first: _Checked | None = None
        for one in several:
            if getattr(one, column) and first is None:
                first = one
            elif first and getattr(one, column) not in ("", getattr(first, column)):
                words = f"{shortened(repr(getattr(first, column)))} and {shortened(repr(getattr(one, column)))}"
                raise _contradiction(first, one, f"different {column}s, {words}: keep one", source)


def _one(several: Sequence[_Checked], source: object) -> tuple[Sequence[_Checked], Sequence[_Checked]]:
    """The first of rows that are the same, and the others."""
    first, *others = several
    for other in others:
        if other.emotion != first.emotion:
            what = f"different emotions, {_emotions_of(first, other)}: keep one; or, if they are votes of several "
            raise _contradiction(first, other, f"{what}raters, add a column rater", source)
    return [first], others


def _votes(several: Sequence[_Checked], source: object) -> tuple[Sequence[_Checked], Sequence[_Checked]]:
    """One row of every rater, and those that repeat one; a row without a rater's name is a vote of its own."""
    votes: list[_Checked] = []
    again: list[_Checked] = []
    of_rater: dict[str, _Checked] = {}
    for one in several:
        first = of_rater.setdefault(one.rater, one) if one.rater else one
        if first.emotion != one.emotion:
            what = f"different emotions by rater {shortened(repr(one.rater))}, {_emotions_of(first, one)}: keep one"
            raise _contradiction(first, one, what, source)
        (votes if first is one else again).append(one)
    return votes, again


def _contradiction(one: _Checked, other: _Checked, what: str, source: object) -> UserError:
    path = shortened(one.path, 160)
    return UserError(f"{source}: {one.where} and {other.where} contradict each other: they give {path} {what}")


def _emotions_of(one: _Checked, other: _Checked) -> str:
    return f"{shortened(repr(one.emotion))} and {shortened(repr(other.emotion))}"


def _some(words: Sequence[str]) -> str:
    return first_few([shortened(word, 40) for word in words], MOST_NAMED)


def _elected(votes: Sequence[_Checked]) -> tuple[str, float] | str:
    """The emotion with the most votes and its share of them; or why there is none."""
    ranked = Counter(vote.emotion for vote in votes).most_common()
    (emotion, most), *others = ranked
    if others and others[0][1] == most:
        return f"{DIVIDED}: {_some([f'{shortened(other, 30)} {n}' for other, n in ranked])}"
    return emotion, most / len(votes)


def _ids(name: str, recordings: Sequence[Recording]) -> dict[Recording, str]:
    """The id of every recording: its path without the suffix, which stays where two would have one id."""
    paths = {path for path, _, _ in recordings}
    stems = Counter(_stem(path) for path in paths)
    kept = {path: stems[_stem(path)] > 1 or _stem(path) in paths for path in paths}
    return {
        (path, start, end): f"{name}/{path if kept[path] else _stem(path)}{_part(start, end)}"
        for path, start, end in recordings
    }


def _stem(path: str) -> str:
    return Path(path).with_suffix("").as_posix()


def _part(start: float | None, end: float | None) -> str:
    return "" if start is None and end is None else f"#{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"


def _utterance(
    name: str, utterance_id: str, several: Sequence[_Checked], emotion: str, agreement: float | None
) -> Utterance:
    first = several[0]

    def given(column: str) -> str | None:
        return next(filter(None, (getattr(one, column) for one in several)), None)

    return Utterance(
        utterance_id=utterance_id,
        corpus=name,
        speaker=given("speaker") or unknown_speaker(name, first.path),
        emotion=emotion,
        path=first.path,
        text_id=given("text"),
        gender=given("gender"),
        language=given("language"),
        split=given("split"),
        perceived=None if agreement is None else emotion,
        agreement=agreement,
        start=first.start,
        end=first.end,
    )
