"""One finding of the audit, and all of them as a table: ``audit.csv``, which `Experiment.exclude` reads."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ser_ray.schema import first_few

Row = Mapping[str, Any]
Group = dict[str, Any]
"""What belongs together in a finding: ``utterances`` (utterance_id, speaker, emotion) or ``speakers``; with several
folds also ``folds``, those in which the finding holds for it."""
Finding = dict[str, Any]
"""level, what, detail; groups, if it is about certain utterances or speakers; with several folds also folds."""

COLUMNS: Final = (
    *("utterance_id", "speaker", "emotion", "exclude", "reason"),
    *("level", "finding", "group", "folds", "detail"),
)
"""The columns of audit.csv."""
SHOWN: Final = 5
"""Names in a human-readable line; audit.json and audit.csv have all."""


def finding(level: str, what: str, detail: str, groups: Sequence[Group] = ()) -> Finding:
    """A finding; of one that is about certain utterances or speakers ``groups`` has all, ``detail`` the first few."""
    return {"level": level, "what": what, "detail": detail} | ({"groups": list(groups)} if groups else {})


def some(names: Sequence[str]) -> str:
    """How many names there are, and the first few."""
    return f"{len(names)}: {first_few(names, SHOWN)}"


def named(row: Row) -> dict[str, str]:
    """What a finding says of an utterance."""
    return {key: row[key] for key in ("utterance_id", "speaker", "emotion")}


def counted(exclusions: Sequence[Row]) -> str:
    """How many utterances are excluded, or would be, in total and by what names them."""
    counts = Counter(one["by"] for one in exclusions)
    total = f"{counts.total()} utterance{'s' * (counts.total() != 1)}"
    return f"{total} ({', '.join(f'{number} by {what}' for what, number in sorted(counts.items()))})"


def csv_text(audit: Mapping[str, Any]) -> str:
    """All findings of an audit, and all utterances that are excluded already, as CSV with the columns `COLUMNS`.

    Of a finding about certain utterances there is a row for each, and those of one recording have the same number in
    ``group``. ``exclude`` is ``yes`` for utterances that are excluded, and for those that ``exclude: [duplicates,
    mislabelled]`` would exclude: the file can be given as ``experiment.exclude``, as it is or edited.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(audit))
    return text.getvalue()


# -- below: how it is done


def _rows(audit: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    reasons = {one["utterance_id"]: one["reason"] for one in audit["to_exclude"]}
    for one in audit["findings"]:
        what = {"level": one["level"], "finding": one["what"]}
        for number, group in enumerate(one.get("groups", ()), start=1):
            place = what | {"group": number, "folds": "; ".join(group.get("folds", ()))}
            yield from (place | {"speaker": speaker} for speaker in group.get("speakers", ()))
            for utterance in group.get("utterances", ()):
                reason = reasons.get(utterance["utterance_id"])
                yield place | utterance | ({"exclude": "yes", "reason": reason} if reason else {})
        if "groups" not in one:
            yield what | {"folds": "; ".join(one.get("folds", ())), "detail": one["detail"]}
    for utterance in audit["excluded"]:
        said = {key: utterance[key] for key in ("utterance_id", "speaker", "emotion", "reason")}
        yield said | {"exclude": "yes", "level": "excluded", "finding": utterance["by"]}
