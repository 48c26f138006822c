"""Audio fingerprints: detect one recording again after resampling, trimming, a change of level, or a lossy codec.

After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): a bit of a fingerprint says
whether the contrast of two neighbouring bands rises or falls in time. Short speech has quiet parts, where noise decides
the bit. So a second bit says whether the first is sure, and only bits that are sure on both sides are compared. Two
recordings of one sentence by one actor disagree in a tenth of them or more, two versions of one recording in hardly
any: ``results/benchmarks/audit.md`` has the measurements, and the reason for `matching.THRESHOLD`.

A second of speech takes 750 bytes. The fingerprints of a shard are in a file beside it, which is written with the
shard; `ser_ray.speech.matching` compares them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from ser_ray.disk import replacing
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import shards
from ser_ray.speech.audio import from_int16

VERSION: Final = 1
"""Raised when fingerprints change, so that cached ones are computed again."""
MADE_FROM: Final = b"made_from"
"""The key of a file's metadata that says what its fingerprints were made from."""

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
MIN_OVERLAP: Final = 0.5
"""As a share of the shorter utterance."""
MIN_CELLS: Final = 300
"""Bits that are sure on both sides; fewer are no evidence."""


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


def path_of(shard: Path) -> Path:
    """The file of a shard's fingerprints."""
    return shard.with_name(f"fingerprints-{VERSION}-{shard.name}")


def write_fingerprints(shard: Path) -> pa.Table:
    """Make the fingerprints of a shard, in one thread, and write them beside it if its directory is writable."""
    with pq.ParquetFile(shard) as file:
        content = file.read(columns=["utterance_id", "audio_sha256", "audio"])
    with threadpool_limits(1):  # one process per core makes them: threads of its own would only wait for each other
        prints = [fingerprint(from_int16(audio.as_buffer())).astype("<u4").tobytes() for audio in content["audio"]]
    columns = [content["utterance_id"].combine_chunks(), pa.array(prints, pa.large_binary())]
    table = pa.table(columns, ["utterance_id", "fingerprint"]).replace_schema_metadata({MADE_FROM: _digest(content)})
    if os.access(shard.parent, os.W_OK):
        with replacing(path_of(shard)) as aside:
            pq.write_table(table, aside, compression="zstd")
    return table


def stored_fingerprints(directory: Path) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Utterance ids and fingerprints of a directory of shards, one shard at a time; those that are missing, or were
    made from other audio, are made first."""
    for shard in shards.shard_paths(directory):
        with pq.ParquetFile(shard) as file:
            made_from = _digest(file.read(columns=["utterance_id", "audio_sha256"]))
        path = path_of(shard)
        is_current = path.is_file() and (pq.read_schema(path).metadata or {}).get(MADE_FROM) == made_from
        table = pq.read_table(path) if is_current else write_fingerprints(shard)
        prints = [np.frombuffer(content.as_buffer(), "<u4").reshape(-1, 3) for content in table["fingerprint"]]
        yield table["utterance_id"].to_pylist(), prints


def read_fingerprints(directory: Path) -> dict[str, np.ndarray]:
    """The fingerprint of every utterance of a directory of shards, by id."""
    return {i: p for ids, prints in stored_fingerprints(directory) for i, p in zip(ids, prints, strict=True)}


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


def _digest(rows: pa.Table) -> bytes:
    """Of the utterances of a shard and their audio."""
    content = [rows[name].to_pylist() for name in ("utterance_id", "audio_sha256")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest().encode()
