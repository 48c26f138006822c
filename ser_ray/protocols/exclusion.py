"""Which utterances an experiment leaves out, and why (`Experiment.exclude`).

They are left out when a fold is made, not when a corpus is prepared: one set of shards serves an experiment with them
and one without.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from ser_ray.config import EXCLUDABLE
from ser_ray.disk import expanded
from ser_ray.schema import UserError, shortened
from ser_ray.speech.matching import SameRecording

Rows = Sequence[Mapping[str, Any]]

COLUMNS: Final = ("utterance_id", "speaker", "emotion", "audio_sha256")
"""What `recordings` and `flawed` need of an index."""
YES: Final = frozenset({"yes", "true", "1"})
NO: Final = frozenset({"", "no", "false", "0"})


class Exclusion(NamedTuple):
    """Why an utterance is left out."""

    by: str
    """``duplicates``, ``mislabelled``, or the name of the file that lists it."""
    reason: str


def recordings(rows: Rows, pairs: Iterable[SameRecording]) -> list[Rows]:
    """Groups of two or more utterances that are one recording, each in order of id: of identical audio, or versions of
    one recording. Versions of versions are in one group. Pairs of utterances that are not in ``rows`` are ignored."""
    parent = {row["utterance_id"]: row["utterance_id"] for row in rows}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[str, str] = {}
    links = [(row["utterance_id"], first.setdefault(row["audio_sha256"], row["utterance_id"])) for row in rows]
    links += [(pair.one, pair.other) for pair in pairs if pair.one in parent and pair.other in parent]
    for one, other in links:
        parent[root(one)] = root(other)
    groups = defaultdict(list)
    for row in sorted(rows, key=_id):
        groups[root(_id(row))].append(row)
    return [group for group in groups.values() if len(group) > 1]


def flawed(rows: Rows, pairs: Iterable[SameRecording], kinds: Collection[str] = EXCLUDABLE) -> dict[str, Exclusion]:
    """The utterances that add nothing or contradict others, by id: ``mislabelled``, one recording under several
    emotions, of which none can be trusted; and ``duplicates``, the others of a recording but the first by id."""
    found: dict[str, Exclusion] = {}
    for group in recordings(rows, pairs):
        emotions = sorted({row["emotion"] for row in group})
        if len(emotions) > 1 and "mislabelled" in kinds:
            reason = f"one recording is {' and '.join(emotions)}"
            found |= {_id(row): Exclusion("mislabelled", reason) for row in group}
        elif "duplicates" in kinds:
            found |= {
                _id(row): Exclusion("duplicates", f"the recording is that of {_id(group[0])}") for row in group[1:]
            }
    return found


def without(
    index: pa.Table, exclude: Sequence[str], known: Iterable[str], pairs: Callable[[], Iterable[SameRecording]]
) -> tuple[pa.Table, pa.Table]:
    """A labelled index without the utterances that ``exclude`` names, and those, with the columns of `Exclusion`.

    Args:
        index: the utterances of the experiment.
        exclude: as in `Experiment.exclude`.
        known: ids of all prepared utterances, which a file may name.
        pairs: called for the versions of one recording, if they are needed.

    Raises UserError for a file that names an utterance that is not known, and if nothing is left.
    """
    kinds = [what for what in exclude if what in EXCLUDABLE]
    found = flawed(index.select(COLUMNS).to_pylist(), pairs(), kinds) if kinds else {}
    known = frozenset(known) if len(kinds) < len(exclude) else frozenset()
    for path in (Path(what) for what in exclude if what not in EXCLUDABLE):
        listed = read_list(path)
        if unknown := [utterance_id for utterance_id in listed if utterance_id not in known]:
            line, more = listed[unknown[0]][0], f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UserError(
                f"experiment.exclude: {path}, line {line}: {shortened(repr(unknown[0]))}{more} is no utterance of the "
                "experiment's corpora; correct or remove the row"
            )
        found |= {utterance_id: Exclusion(path.name, reason) for utterance_id, (_, reason) in listed.items()}
    reasons = [found.get(utterance_id) for utterance_id in index["utterance_id"].to_pylist()]
    is_out = pa.array([reason is not None for reason in reasons], pa.bool_())
    left, out = index.filter(pa.compute.invert(is_out)), index.filter(is_out)
    if not left.num_rows:
        raise UserError("experiment.exclude leaves out every utterance; remove what it names too much")
    for number, name in enumerate(Exclusion._fields):
        out = out.append_column(name, pa.array([reason[number] for reason in reasons if reason], pa.string()))
    return left, out


def read_list(path: str | Path) -> dict[str, tuple[int, str]]:
    """The utterances that a CSV file leaves out: id -> the line that names it first, and its column reason, if any.

    Raises UserError, with the file and the line, for what cannot be read.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"experiment.exclude: {path}: no such file")
    listed: dict[str, tuple[int, str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if "utterance_id" not in (reader.fieldnames or ()):
                raise UserError(f"experiment.exclude: {path}, line 1: no column utterance_id")
            for row in reader:
                where = f"experiment.exclude: {path}, line {reader.line_num}"
                answer = (row.get("exclude", "yes") or "").strip().lower()
                if answer not in YES | NO:
                    raise UserError(f"{where}: exclude is {shortened(repr(answer))}; write yes, or leave it empty")
                if answer in NO:
                    continue
                if not (utterance_id := (row["utterance_id"] or "").strip()):
                    raise UserError(f"{where}: no utterance_id")
                listed.setdefault(utterance_id, (reader.line_num, (row.get("reason") or "").strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"experiment.exclude: {path}: not readable as CSV in UTF-8: {error}") from None
    return listed


# -- below: how it is done


def _id(row: Mapping[str, Any]) -> str:
    return str(row["utterance_id"])
