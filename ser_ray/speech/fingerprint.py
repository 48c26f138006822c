"""Audio fingerprints: detect one recording again after resampling, trimming, a change of level, or a lossy codec.

After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): a bit of a fingerprint says
whether the contrast of two neighbouring bands rises or falls in time. Short speech has quiet parts, where noise decides
the bit. So a second bit says whether the first is sure, and only bits that are sure on both sides are compared. Two
recordings of one sentence by one actor disagree in a tenth of them or more, two versions of one recording in hardly
any: ``results/benchmarks/audit.md`` has the measurements, and the reason for `THRESHOLD`.

Candidate pairs share landmarks (the bands whose contrast changes most, at three moments), and are found by sorting, not
by comparing all pairs. A second of speech takes 750 bytes; fingerprints are cached beside the shards in
``fingerprints.parquet``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.disk import replacing
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import shards
from ser_ray.speech.audio import from_int16

VERSION: Final = 1
"""Raised when fingerprints change, so that cached ones are computed again."""
FILE: Final = "fingerprints.parquet"

WINDOW: Final = 2048
"""Samples, 128 ms: long against `HOP`, so that versions of one recording match even if their frames are not aligned."""
HOP: Final = 256
"""Samples, 16 ms."""
BANDS: Final = 33
RANGE: Final = (300.0, 3400.0)
"""Hz: the band of telephone speech."""
LAG: Final = 4
"""Frames over which the change of a contrast is measured."""
FLOOR_DB: Final = 30.0
"""More than this below the loudest cell of an utterance, noise and codecs dominate."""
SURE_DB: Final = 1.0
"""A larger change of contrast is sure."""
STEP: Final = 8
"""Frames between the three moments of a landmark."""
NONE: Final = np.uint32(0xFFFFFFFF)
"""In place of a landmark where too little changes."""
NEIGHBOURS: Final = 8
"""Utterances with the same landmark that each is paired with: a bound on the work, however repetitive the speech."""
VOTES: Final = 2
"""Landmarks that must agree on the offset of two utterances before their bits are compared."""
PART: Final = 20_000
"""Utterances whose candidates are in memory at once: about 0.5 GB."""
MIN_OVERLAP: Final = 0.5
"""As a share of the shorter utterance."""
MIN_CELLS: Final = 300
"""Bits that are sure on both sides; fewer are no evidence."""
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


def fingerprint(waveform: np.ndarray) -> np.ndarray:
    """(T,) float, mono at 16 kHz -> (F, 3) uint32: per 16 ms the bits, which of them are sure, and the landmark.

    >>> tone = np.sin(np.arange(16_000) / 10)
    >>> fingerprint(tone).shape
    (51, 3)
    >>> fingerprint(tone)[:, 1].any()  # a tone does not change: nothing is sure
    np.False_
    """
    change_FB = _change(waveform)
    most, least = change_FB.argmax(axis=1), change_FB.argmin(axis=1)
    is_clear = (change_FB.max(axis=1) > SURE_DB) & (change_FB.min(axis=1) < -SURE_DB)
    moment = np.where(is_clear, most * 32 + least, -1)
    landmark = np.full(len(moment), NONE)
    if (count := len(moment) - 2 * STEP) > 0:
        first, second, third = (moment[start : start + count] for start in (0, STEP, 2 * STEP))
        clear = (first >= 0) & (second >= 0) & (third >= 0)
        landmark[:count][clear] = (first + second * 2**10 + third * 2**20)[clear]
    return np.stack([_pack(change_FB > 0), _pack(np.abs(change_FB) > SURE_DB), landmark], axis=1)


def difference(one: np.ndarray, other: np.ndarray, offset: int) -> float:
    """The share of sure bits that disagree, if frame ``offset`` of ``one`` is frame 0 of ``other``; 1 if too few
    frames or sure bits overlap."""
    start, stop = max(0, offset), min(len(one), len(other) + offset)
    if stop - start < MIN_OVERLAP * min(len(one), len(other)):
        return 1.0
    one, other = one[start:stop], other[start - offset : stop - offset]
    sure = one[:, 1] & other[:, 1]
    cells = int(np.bitwise_count(sure).sum())
    return float(np.bitwise_count((one[:, 0] ^ other[:, 0]) & sure).sum()) / cells if cells >= MIN_CELLS else 1.0


def same_recordings(prints: Mapping[str, np.ndarray]) -> list[SameRecording]:
    """All pairs of utterances that are versions of one recording, by id; of many versions, pairs that link them.

    ``prints`` maps an utterance's id to its `fingerprint`. Recordings of less than half a second have no landmark and
    are not detected.
    """
    ids = sorted(prints)
    least: dict[tuple[int, int], float] = {}
    for one, other, offset in _candidates([prints[i] for i in ids]):
        share = min(difference(prints[ids[one]], prints[ids[other]], offset + d) for d in (-1, 0, 1))
        if share <= THRESHOLD:
            least[one, other] = min(share, least.get((one, other), 1.0))
    alike = [(ids[one], ids[other], share) for (one, other), share in sorted(least.items())]
    return [SameRecording(*pair) for pair in alike if not _repeats(prints[pair[0]])]


def same_recordings_in(directories: Iterable[Path]) -> list[SameRecording]:
    """`same_recordings` over all utterances of some directories of shards."""
    return same_recordings({i: p for directory in directories for i, p in read_fingerprints(directory).items()})


def read_fingerprints(directory: Path) -> dict[str, np.ndarray]:
    """The fingerprint of every utterance of a directory of shards; computed once, and cached there if it is writable.

    One shard is in memory at a time.
    """
    path = directory / FILE
    made_from = {b"made_from": f"{VERSION} {shards.read_manifest(directory)['content_sha256']}".encode()}
    if path.is_file() and (pq.read_schema(path).metadata or {}).items() >= made_from.items():
        table = pq.read_table(path)
    else:
        rows = [row for shard in shards.read_tables([directory]) for row in _rows(shard)]
        schema = pa.schema([("utterance_id", pa.string()), ("fingerprint", pa.large_binary())], metadata=made_from)
        table = pa.Table.from_pylist(rows, schema=schema)
        if os.access(directory, os.W_OK):
            with replacing(path) as aside:
                pq.write_table(table, aside, compression="zstd")
    ids, prints = table["utterance_id"].to_pylist(), table["fingerprint"].to_pylist()
    return {i: np.frombuffer(content, "<u4").reshape(-1, 3) for i, content in zip(ids, prints, strict=True)}


# -- below: how it is done


@cache
def _filters() -> np.ndarray:
    """(WINDOW // 2 + 1, BANDS) float32: overlapping triangles, evenly spaced in log frequency."""
    frequency = np.fft.rfftfreq(WINDOW, 1 / SAMPLING_RATE)[:, None]
    edges = np.geomspace(*RANGE, BANDS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((frequency - low) / (centre - low), (high - frequency) / (high - centre))
    return np.maximum(triangles, 0).astype(np.float32)


def _change(waveform: np.ndarray) -> np.ndarray:
    """(F, BANDS - 1), dB: how much the contrast of neighbouring bands changes over `LAG` frames."""
    waveform = np.asarray(waveform, np.float32)
    waveform = np.pad(waveform, (0, max(0, WINDOW + LAG * HOP - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::HOP] * np.hanning(WINDOW).astype(np.float32)
    power_FB = np.square(np.abs(np.fft.rfft(frames, axis=1))) @ _filters()
    floor = max(float(power_FB.max()) * 10 ** (-FLOOR_DB / 10), 1e-20)
    contrast_FB = np.diff(10 * np.log10(power_FB + floor), axis=1)
    return np.asarray(contrast_FB[LAG:] - contrast_FB[:-LAG])


def _pack(bits_FB: np.ndarray) -> np.ndarray:
    """(F, 32) bool -> (F,) uint32."""
    return np.packbits(bits_FB, axis=1, bitorder="little").view("<u4")[:, 0].astype(np.uint32)


def _repeats(print_F3: np.ndarray) -> bool:
    return any(difference(print_F3, print_F3, offset) <= REPEATS for offset in range(STEP, len(print_F3) // 2 + 1))


def _rows(shard: pa.Table) -> Iterable[dict[str, object]]:
    """The cached row of every utterance of a shard."""
    for i, audio in zip(shard["utterance_id"].to_pylist(), shard["audio"], strict=True):
        yield {"utterance_id": i, "fingerprint": fingerprint(from_int16(audio.as_buffer())).astype("<u4").tobytes()}


def _candidates(prints: list[np.ndarray]) -> Iterable[tuple[int, int, int]]:
    """Pairs of positions, the smaller first, and an offset in frames that at least `VOTES` landmarks agree on."""
    if not prints:
        return
    assert len(prints) < 2**23, "positions are packed into 24 bits below"
    marked = [np.flatnonzero(p[:, 2] != NONE).astype(np.int32) for p in prints]
    word = np.concatenate([p[frames, 2] for p, frames in zip(prints, marked, strict=True)])
    owner = np.repeat(np.arange(len(prints), dtype=np.int32), [len(frames) for frames in marked])
    frame = np.concatenate(marked)
    order = np.argsort(word, kind="stable")  # utterances in their order within a word, frames within an utterance
    word, owner, frame = word[order], owner[order], frame[order]
    is_first = np.r_[True, (word[1:] != word[:-1]) | (owner[1:] != owner[:-1])][: len(word)]
    word, owner, frame = word[is_first], owner[is_first], frame[is_first]
    for part in range(parts := 1 + len(prints) // PART):  # so that memory stays bounded
        hits = []
        for step in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero((word[:-step] == word[step:]) & (owner[:-step] % parts == part))
            apart = frame[same] - frame[same + step] + 2**15
            one, other = (owner[rows].astype(np.int64) for rows in (same, same + step))
            hits.append(one << 40 | other << 16 | apart)  # as one number, which sorts ten times as fast
        pairs, votes = np.unique(np.concatenate(hits), return_counts=True)
        for pair in pairs[votes >= VOTES].tolist():
            yield pair >> 40, pair >> 16 & 2**24 - 1, (pair & 2**16 - 1) - 2**15
