"""How many utterances a second a trial's threads make into batches, as `ser_ray.runtime.feed` does it.

    python tests/benchmarks/feed.py > results/benchmarks/feed.md

No network, no model, no Ray: synthetic utterances of 4 s in memory, in batches of 120 s, each augmentation alone and
all of them, by number of threads; and reading the same utterances from Parquet files. Rounds take all ways in turn, and
the best counts. A rate is by the wall, and by a second of a CPU: the latter is what one core does if nothing else keeps
it, whatever else runs on the machine, and what is multiplied to predict a machine with more cores. Masks of SpecAugment
are no part of it: they are drawn on the device.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.config import Experiment
from ser_ray.runtime import feed
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import stream
from ser_ray.speech.audio import to_int16
from ser_ray.speech.order import PIECE

SECONDS: Final = 4.0
CONSUMED: Final = 760
"""Utterances of 4 s a second that a card takes: LoRA of whisper-large-v3's shape at 40 % of an H100's peak (0.52 TFLOP
each of 4 x parameters x frames)."""
WANTED: Final = 3 * CONSUMED
CORES: Final = 16
"""Of the machine that is predicted."""
WAYS: Final = {
    "no augmentation": {},
    "gain_db: 6": {"gain_db": 6},
    "noise_snr_db: [10, 20]": {"noise_snr_db": [10, 20]},
    "speed: 0.1": {"speed": 0.1},
    "crop_seconds: 3": {"crop_seconds": 3},
    "all of them": {"gain_db": 6, "noise_snr_db": [10, 20], "speed": 0.1, "crop_seconds": 3},
}


@dataclass(frozen=True)
class Rate:
    """Utterances by a second of the wall, and by a second of a CPU."""

    wall: float
    cpu: float

    def best(self, other: Rate) -> Rate:
        return Rate(max(self.wall, other.wall), max(self.cpu, other.cpu))


def speech(count: int) -> pa.Table:
    """Noise, as the shards give it."""
    rng = np.random.default_rng(0)
    audio = [to_int16(0.1 * rng.standard_normal(int(SECONDS * SAMPLING_RATE))).tobytes() for _ in range(count)]
    return pa.table(
        {
            "utterance_id": [f"synthetic/{number:05d}" for number in range(count)],
            "num_samples": pa.array([int(SECONDS * SAMPLING_RATE)] * count, pa.int32()),
            "audio": pa.array(audio, pa.large_binary()),
            "label": pa.array([number % 4 for number in range(count)], pa.int64()),
            "corpus": ["synthetic"] * count,
            "shard": pa.array(["synthetic"] * count).dictionary_encode(),
            "row": pa.array(range(count), pa.int32()),
        }
    )


def measured(items: Callable[[], Iterable[object]], utterances: int) -> Rate:
    """The rate of taking all items; of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in items():
        pass
    return Rate(utterances / (time.perf_counter() - wall), utterances / (time.process_time() - cpu))


def batches_of(table: pa.Table, augment: dict[str, object], threads: int) -> Callable[[], Iterable[stream.Batch]]:
    """An epoch of training, as a trial's loop asks for it."""
    experiment = Experiment.model_validate(
        {"name": "feed", "corpora": {"synthetic": None}, "backbone": "none", "batch_seconds": 120, "augment": augment}
    )
    held = stream.Held(table)
    data = feed.data(experiment, held, stream.Held(table.slice(0, 1)), stream.SPEECH, threads=threads)
    return partial(data.train, 1)


def written(table: pa.Table, directory: Path) -> pa.Table:
    """The same speech in a file in row groups of a shard's size; its rows."""
    path = directory / "shard.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}  # as the shards have them
    pq.write_table(table.select(["utterance_id", "audio"]), path, row_group_size=PIECE, **options)
    shard = pa.array([str(path)] * table.num_rows).dictionary_encode()
    return table.drop_columns(["audio", "shard"]).append_column("shard", shard)


def measure(utterances: int, threads: list[int], rounds: int) -> dict[tuple[str, int], Rate]:
    """Every way, round after round."""
    table, found = speech(utterances), {}
    with tempfile.TemporaryDirectory() as scratch:
        rows = written(table, Path(scratch))
        ways = {(name, n): batches_of(table, augment, n) for name, augment in WAYS.items() for n in threads}
        ways["read from a file", 1] = lambda: stream.read_files(rows, "audio")
        for _ in range(rounds):
            for way, items in ways.items():
                rate = measured(items, utterances)
                found[way] = rate.best(found.get(way, rate))
    return found


def page(given: list[str], found: dict[tuple[str, int], Rate], utterances: int, rounds: int) -> str:
    """The table as Markdown, with what it predicts for a machine of `CORES` cores."""
    lines = [
        "# How fast batches are made",
        "",
        f"```\n{' '.join(['python', 'tests/benchmarks/feed.py', *given])}\n```",
        "",
        f"{utterances} synthetic utterances of {SECONDS:g} s in memory, batches of 120 s, best of {rounds} rounds; a "
        f"machine of {os.cpu_count()} cores, at a load of {os.getloadavg()[0]:.0f} processes by others and this: the "
        "rates by the wall are those of a busy machine, those of a CPU second are not.",
        f"Wanted is three times what a card takes: {WANTED} utterances a second (`CONSUMED` in the script says why). "
        "Threads: how many that needs, by the rate of a CPU second. NumPy and soxr let Python's other threads run "
        f"meanwhile. Predicted for {CORES} cores, and not measured: that rate times {CORES - 1}, one core being left "
        "to the training loop; an upper bound, as memory and Python's lock are not in it.",
        "",
        f"| way | threads | utterances/s, wall | utterances per CPU second | threads for {WANTED}/s | "
        f"predicted on {CORES} cores |",
        "|---|---|---|---|---|---|",
    ]
    for (name, threads), rate in found.items():
        needed = -(-WANTED // rate.cpu)
        predicted = (CORES - 1) * rate.cpu
        lines.append(f"| {name} | {threads} | {rate.wall:.0f} | {rate.cpu:.0f} | {needed:.0f} | {predicted:.0f} |")
    return "\n".join(lines)


def main(given: list[str]) -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--utterances", type=int, default=1024)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(given)
    found = measure(arguments.utterances, arguments.threads, arguments.rounds)
    print(page(given, found, arguments.utterances, arguments.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
