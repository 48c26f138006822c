"""The recordings that an export is compared on: dev utterances where they are at hand, else synthetic speech."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import soundfile
import soxr

from ser_ray.corpora import synthetic
from ser_ray.disk import read_json
from ser_ray.models.ensemble import Model
from ser_ray.protocols.task import Task, load_task
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import shards, stream
from ser_ray.speech.audio import from_int16

MOST: Final = 300
"""Dev utterances: both programs answer them on a CPU. A wrong export differs on the first, and so many say whether UAR
is the same."""
ABOVE: Final = 3
"""How many folders above a checkpoint its results folder may be: trials/001/epoch_007."""
JOINED: Final = (*(1,) * 16, 2, 3, 5, 40)
"""How many synthetic sentences of 1 to 2 s each recording has; the last is longer than any window."""
SHORT: Final = (0.4, 0.7)
"""Seconds of two recordings that are cut from a sentence."""


@dataclass(frozen=True)
class Recordings:
    """N recordings for a comparison."""

    source: str
    """What they are, for a reader."""
    waveforms: list[np.ndarray]
    """Each (T,) float32 at 16 kHz."""
    labels: np.ndarray | None = None
    """(N,) places in the model's emotions, where they are known."""


def recordings_for(directory: Path, model: Model) -> Recordings:
    """Dev utterances of the search that the checkpoint in ``directory`` is of, if its results folder and the prepared
    data are on this machine; else synthetic speech of several lengths."""
    results, shard_dirs = results_of(directory), data_of(directory)
    return _of_dev(results, shard_dirs, model) if results and shard_dirs else _synthetic()


def results_of(directory: Path) -> Path | None:
    """The results folder that a checkpoint lies in; None if in none."""
    return next((above for above in directory.parents[:ABOVE] if (above / "provenance.json").is_file()), None)


def data_of(directory: Path) -> list[Path]:
    """The prepared data that a checkpoint was trained and tested on; empty where some of it is not on this machine."""
    results = results_of(directory)
    data = [Path(one["directory"]) for one in read_json(results / "provenance.json")["data"]] if results else []
    return data if all(shards.is_whole(shard_dir) for shard_dir in data) else []


def labels_of(rows: pa.Table, task: Task, model: Model) -> np.ndarray:
    """(N,) places in the model's emotions, of these rows of a task."""
    places = np.array([model.experiment.emotions.index(emotion) for emotion in task.emotions])
    labels: np.ndarray = places[rows["label"].to_numpy()]
    return labels


# -- below: how it is done


def _of_dev(results: Path, shard_dirs: list[Path], model: Model) -> Recordings:
    task = load_task(model.experiment, shard_dirs)
    rows = task.rows("dev")
    part = f", every {rows.num_rows / MOST:.1f}th of {rows.num_rows}" if rows.num_rows > MOST else ""
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, min(MOST, rows.num_rows)).round().astype(int))
    rows = rows.take(chosen)
    table = stream.joined(rows, stream.read_files(rows, "audio"))
    waveforms = [from_int16(scalar.as_buffer()) for scalar in table["audio"]]
    return Recordings(f"dev utterances of {results.name}{part}", waveforms, labels_of(rows, task, model))


def _synthetic() -> Recordings:
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        synthetic.make(Path(scratch) / "speech", speakers=6, repetitions=1)
        sentences = [_at_16_khz(path) for path in sorted((Path(scratch) / "speech").glob("*.wav"))]
    waveforms = [sentences[n][: round(seconds * SAMPLING_RATE)] for n, seconds in enumerate(SHORT)]
    waveforms += list(_joined(sentences))
    longest = max(map(len, waveforms)) / SAMPLING_RATE
    return Recordings(f"synthetic speech, {min(SHORT)} to {longest:.0f} s", waveforms)


def _at_16_khz(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    resampled: np.ndarray = soxr.resample(samples, rate, SAMPLING_RATE)
    return resampled


def _joined(sentences: list[np.ndarray]) -> Iterator[np.ndarray]:
    first = 0
    for count in JOINED:
        yield np.concatenate([sentences[n % len(sentences)] for n in range(first, first + count)])
        first += count
