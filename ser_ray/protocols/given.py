"""Folds from a CSV file: one row per speaker, with the columns speaker (``ravdess/01``) and fold (a number from 0)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

from ser_ray.disk import expanded
from ser_ray.schema import UserError, shortened

DIGITS: Final = 4
"""Maximum length of a fold's number: ten thousand folds or more are a mistake, since every fold is a separate run."""


def read_folds(path: str | Path) -> tuple[tuple[str, ...], ...]:
    """The speakers of every fold, in order of the fold's number; other columns are ignored.

    Raises UserError, with the file and the line, for a missing column, a fold that is not a number, a row without a
    speaker, a speaker that occurs twice, and a fold number that is left out.
    """
    path = expanded(path)
    if not path.is_file():
        raise UserError(f"protocol.given: {path}: no such file")
    fold_of: dict[str, int] = {}
    line_of: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := {"speaker", "fold"} - set(reader.fieldnames or ()):
                raise UserError(f"{path}, line 1: no column {' and '.join(sorted(missing))}; needs speaker and fold")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                speaker, fold = (row["speaker"] or "").strip(), (row["fold"] or "").strip()
                if not speaker:
                    raise UserError(f"{where}: no speaker")
                if not (fold.isascii() and fold.isdigit() and len(fold) <= DIGITS):
                    raise UserError(f"{where}: fold {shortened(repr(fold))} is not a number from 0 to {10**DIGITS - 1}")
                if speaker in fold_of:
                    raise UserError(
                        f"{where}: {shortened(speaker)} is in line {line_of[speaker]} already; a speaker is in one fold"
                    )
                fold_of[speaker], line_of[speaker] = int(fold), reader.line_num
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8: {error}") from None
    count = max(fold_of.values(), default=-1) + 1
    if absent := sorted(set(range(count)) - set(fold_of.values())):
        raise UserError(f"{path}: no speaker is in fold {absent[0]}; folds are numbered from 0 without gaps")
    return tuple(tuple(s for s, fold in fold_of.items() if fold == number) for number in range(count))
