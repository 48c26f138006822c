"""Find utterances that are versions of one recording, by their fingerprints (`ser_ray.speech.fingerprint`).

Candidate pairs share landmarks (the bands whose contrast changes most, at three moments), and are found by sorting, not
by comparing all pairs. What is sorted is divided among files, of which one is in memory at a time: memory is bounded,
about 2 GB and 250 bytes an utterance, and a temporary folder takes up to 22 kB an utterance of 4 s. What is found is
kept beside the shards, so that the same corpora are compared once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray.config import fingerprint as digest_of
from ser_ray.disk import read_json, write_json
from ser_ray.speech import shards
from ser_ray.speech.fingerprint import NONE, STEP, VERSION, difference, stored_fingerprints

NEIGHBOURS: Final = 8
"""Utterances with the same landmark that each is paired with: a bound on the work, however repetitive the speech."""
VOTES: Final = 2
"""Landmarks that must agree on the offset of two utterances before their bits are compared."""
BLOCK: Final = 2**20
"""Frames that are read at once: 12 MB."""
BUCKET: Final = 2**24
"""Frames whose landmarks are sorted at once: about 2 GB."""
PART: Final = 20_000
"""Utterances whose candidates are in memory at once: about 0.5 GB."""
THRESHOLD: Final = 0.03
"""Share of sure bits that disagree, up to which two utterances are one recording. Versions of one RAVDESS recording
differ by 0.03 at worst and mostly by nothing, its two closest recordings by 0.09."""
REPEATS: Final = 0.15
"""A sound that differs from itself at another time by no more than this (a tone, a beat) matches others of its kind:
no evidence. Speech stays above 0.28."""


@dataclass(frozen=True)
class SameRecording:
    """Two utterances that are one recording, and the share of sure bits in which they disagree."""

    one: str
    other: str
    difference: float


def same_recordings(prints: Mapping[str, np.ndarray]) -> list[SameRecording]:
    """All pairs of utterances that are versions of one recording, by id; of many versions, pairs that link them.

    ``prints`` maps an utterance's id to its `fingerprint`. Recordings of less than half a second have no landmark and
    are not detected.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _same([(list(prints), list(prints.values()))], Path(scratch))


def same_recordings_in(directories: Iterable[Path]) -> list[SameRecording]:
    """`same_recordings` over all utterances of some directories of shards; what was found is kept in the first one, if
    it is writable."""
    directories = list(directories)
    contents = sorted(shards.read_manifest(directory)["content_sha256"] for directory in directories)
    kept = directories[0] / f"same-recordings-{digest_of(VERSION, contents)}.json"
    if kept.is_file():
        return [SameRecording(*pair) for pair in read_json(kept)]
    is_writable = os.access(directories[0], os.W_OK)
    with tempfile.TemporaryDirectory(prefix=".matching-", dir=directories[0] if is_writable else None) as scratch:
        stored = (part for directory in directories for part in stored_fingerprints(directory))
        found = _same(stored, Path(scratch))
    if is_writable:
        write_json(kept, [astuple(pair) for pair in found])
    return found


# -- below: how it is done


@dataclass(frozen=True)
class _Prints:
    """Fingerprints of N utterances, F frames together, one after the other as they were stored."""

    ids: Sequence[str]
    """In order."""
    stored_N: np.ndarray
    """Where the utterance at a position of ``ids`` is among the stored ones."""
    position_N: np.ndarray
    """The inverse: where a stored utterance is in ``ids``."""
    start_N: np.ndarray
    """The first frame of each stored utterance, and last F."""
    rows_F3: np.ndarray
    """In a file."""

    def __getitem__(self, position: int) -> np.ndarray:
        stored = self.stored_N[position]
        return np.asarray(self.rows_F3[self.start_N[stored] : self.start_N[stored + 1]])


class _Piles:
    """Numbers that are too many for the memory, in one file a pile."""

    def __init__(self, directory: Path, count: int, dtype: type[np.generic]) -> None:
        directory.mkdir()
        self.paths, self.dtype = [directory / str(number) for number in range(count)], dtype

    def add(self, pile_K: np.ndarray, items_K: np.ndarray) -> None:
        """Append each item to its pile, in their order."""
        order = np.argsort(pile_K, kind="stable")
        bounds = np.searchsorted(pile_K[order], np.arange(len(self.paths) + 1))
        for path, start, stop in zip(self.paths, bounds, bounds[1:], strict=False):
            if stop > start:
                with path.open("ab") as file:
                    items_K[order[start:stop]].astype(self.dtype).tofile(file)

    def read(self, number: int) -> np.ndarray:
        """A pile, which is removed: it is needed once."""
        path = self.paths[number]
        if not path.is_file():
            return np.empty(0, self.dtype)
        items = np.fromfile(path, self.dtype)
        path.unlink()
        return items


def _same(stored: Iterable[tuple[list[str], list[np.ndarray]]], scratch: Path) -> list[SameRecording]:
    prints = _gathered(stored, scratch / "prints")
    least: dict[tuple[int, int], float] = {}
    for one, other, offset in _candidates(prints, scratch) if len(prints.rows_F3) else ():
        share = min(difference(prints[one], prints[other], offset + d) for d in (-1, 0, 1))
        if share <= THRESHOLD:
            least[one, other] = min(share, least.get((one, other), 1.0))
    ids = prints.ids
    return [
        SameRecording(ids[one], ids[other], share)
        for (one, other), share in sorted(least.items())
        if not _repeats(prints[one])
    ]


def _gathered(stored: Iterable[tuple[list[str], list[np.ndarray]]], path: Path) -> _Prints:
    ids: list[str] = []
    lengths: list[int] = []
    with path.open("wb") as file:
        for part, prints in stored:
            ids += part
            lengths += map(len, prints)
            for print_F3 in prints:
                file.write(print_F3.astype("<u4").tobytes())
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.memmap(path, "<u4", "r").reshape(-1, 3) if start[-1] else np.empty((0, 3), np.uint32)
    return _Prints([ids[stored] for stored in order], order, position, start, rows)


def _repeats(print_F3: np.ndarray) -> bool:
    return any(difference(print_F3, print_F3, offset) <= REPEATS for offset in range(STEP, len(print_F3) // 2 + 1))


def _candidates(prints: _Prints, scratch: Path) -> Iterator[tuple[int, int, int]]:
    """Pairs of positions, the smaller first, and an offset in frames that at least `VOTES` landmarks agree on."""
    assert len(prints.ids) < 2**23, "positions are packed into 24 bits below"
    landmarks = _Piles(scratch / "landmarks", 1 + len(prints.rows_F3) // BUCKET, np.uint32)
    for landmark_M3 in _landmarks(prints):
        landmarks.add(landmark_M3[:, 0] % len(landmarks.paths), landmark_M3)
    hits = _Piles(scratch / "hits", 1 + len(prints.ids) // PART, np.int64)
    for bucket in range(len(landmarks.paths)):
        for one_H, other_H, apart_H in _shared(landmarks.read(bucket).reshape(-1, 3)):
            # As one number, which sorts ten times as fast.
            hits.add(one_H % len(hits.paths), one_H << 40 | other_H << 16 | (apart_H + 2**15))
    for part in range(len(hits.paths)):
        pairs, votes = np.unique(hits.read(part), return_counts=True)
        for pair in pairs[votes >= VOTES].tolist():
            yield pair >> 40, pair >> 16 & 2**24 - 1, (pair & 2**16 - 1) - 2**15


def _landmarks(prints: _Prints) -> Iterator[np.ndarray]:
    """(M, 3) landmarks: which, of the utterance at which position, in which of its frames."""
    for begin in range(0, len(prints.rows_F3), BLOCK):
        word_F = np.asarray(prints.rows_F3[begin : begin + BLOCK, 2])
        frame_M = np.flatnonzero(word_F != NONE)
        stored_M = np.searchsorted(prints.start_N, begin + frame_M, side="right") - 1
        within_M = begin + frame_M - prints.start_N[stored_M]
        yield np.stack([word_F[frame_M], prints.position_N[stored_M], within_M], axis=1).astype(np.uint32)


def _shared(landmark_M3: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of utterances that share a landmark, by their positions, and how many frames apart it is in them."""
    word, owner, frame = landmark_M3.T.astype(np.int64)
    order = np.lexsort((owner, word))  # utterances in their order within a word, frames within an utterance
    word, owner, frame = word[order], owner[order], frame[order]
    is_first = np.r_[True, (word[1:] != word[:-1]) | (owner[1:] != owner[:-1])][: len(word)]
    word, owner, frame = word[is_first], owner[is_first], frame[is_first]
    for step in range(1, NEIGHBOURS + 1):
        same = np.flatnonzero(word[:-step] == word[step:])
        yield owner[same], owner[same + step], frame[same] - frame[same + step]
