"""``emobox:DIR``: a corpus as EmoBox describes it (arXiv 2406.07162, https://github.com/emo-box/EmoBox).

DIR is a corpus's folder, ``EmoBox/data/NAME``: all of its recordings, from ``NAME.jsonl``; with the split of its only
fold, if it has one. Or it is the folder of a fold, ``EmoBox/data/NAME/fold_2``: the splits of that fold, from
``NAME_train_fold_2.jsonl`` and the like, for ``protocol.scheme: official``. Where there is no valid split, dev is taken
from train; files with other names are not read, as EmoBox keeps older ones beside its own. ``label_map.json`` says what
the labels mean. Speakers are not known: the lists of recordings name none, and ``data.seg.wrd.stm`` gives both people
of an IEMOCAP dialogue one name, and every recording of MER2023 its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ser_ray.corpora.rows import Row, example_of, utterances_of
from ser_ray.schema import Rejected, UserError, Utterance

FIRST: Final = 100
"""Recordings of which one must exist below a folder for it to be the one that all paths are relative to."""
OF_FOLD: Final = re.compile(r".+_(train|valid|test)_fold_\d+")
"""The names, without suffix, of the files of a fold."""


def read(name: str, path: Path, labels: Mapping[str, str]) -> tuple[list[Utterance], list[Rejected]]:
    """As `ser_ray.corpora.table.read`. Raises UserError for a folder that is none of EmoBox's."""
    utterances, rejected = utterances_of(name, _rows(path), labels, folder_of(path), path)
    if not utterances:
        raise UserError(f"{path}: no recording can be used{example_of(rejected)}")
    return utterances, rejected


def folder_of(path: Path) -> Path:
    """The folder that the recordings' paths are relative to: the nearest above ``path`` that has one of them. In EmoBox
    it is the one that holds ``data`` and ``downloads``."""
    wavs = [str(entry["wav"]) for entry, _ in islice(_entries(path), FIRST)]
    for folder in (path, *path.parents):
        if any((folder / wav).is_file() for wav in wavs):
            return folder
    example = f", such as {wavs[0]}" if wavs else ""
    raise UserError(f"{path}: none of its recordings is there{example}; its paths begin at a folder above")


# -- below: how it is done


def _rows(path: Path) -> Iterator[Row]:
    meanings = _label_map(path)
    for entry, (file, line) in _entries(path):
        word = str(entry.get("emo", ""))
        yield (
            {
                "path": str(entry["wav"]),
                "speaker": str(entry.get("speaker", "unknown")),
                "emotion": meanings.get(word, word),
                "split": _split_of(file),
                "start": _number(entry.get("start_time")),
                "end": _number(entry.get("end_time")),
            },
            f"{file.name}, line {line}",
        )


def _number(value: object) -> str:
    return "" if value is None else str(value)


def _files(path: Path) -> list[Path]:
    folds = [path] if path.name.startswith("fold_") else sorted(path.glob("fold_*"))
    if len(folds) == 1 and (files := [file for file in sorted(folds[0].glob("*.jsonl")) if _split_of(file)]):
        return files
    whole = path / f"{path.name}.jsonl"
    if not whole.is_file():
        raise UserError(f"{path}: no {whole.name} and no fold in it; give a folder such as EmoBox/data/iemocap")
    return [whole]


def _entries(path: Path) -> Iterator[tuple[dict[str, Any], tuple[Path, int]]]:
    for file in _files(path):
        try:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict) or "wav" not in entry:
                        raise UserError(f"{file}, line {number}: no recording: it has no wav")
                    yield entry, (file, number)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}: not readable as JSON lines: {error}") from None


def _split_of(file: Path) -> str:
    """``iemocap_train_fold_1.jsonl``: train; of a whole corpus, none."""
    of_fold = OF_FOLD.fullmatch(file.stem)
    return of_fold[1] if of_fold else ""


def _label_map(path: Path) -> dict[str, str]:
    for folder in (path, path.parent):
        file = folder / "label_map.json"
        if file.is_file():
            try:
                return {
                    str(word): str(meaning) for word, meaning in json.loads(file.read_text(encoding="utf-8")).items()
                }
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{file}: not readable: {error}") from None
    return {}
