"""What grows with the corpus and the cluster, measured where it fits: the slopes of the plan in cluster/README.md.

    python tests/benchmarks/plan.py SHARDS > results/benchmarks/plan.md

SHARDS: a directory of prepared speech (``ser-ray prepare`` prints it). Made-up indexes, fingerprints and trials stand
for large ones; every size runs in a process of its own, so that its peak of memory is its own. Time is processor time,
which other work on the machine does not change.
"""

from __future__ import annotations

import heapq
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from ray.tune.schedulers import TrialScheduler

from ser_ray.config import SearchSpace
from ser_ray.evaluation import folder
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime.searchers import OptunaSearcher, ReplayingASHA
from ser_ray.speech import fingerprint, matching, order, shards, stream
from ser_ray.trials.records import Trials

PLANNED = 5_000
"""Hours."""
SECONDS = 4.0
"""Of an utterance."""
GPUS = 64
EMOTIONS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprised")


def space(**settings: Any) -> SearchSpace:
    """One that searches rank and rate."""
    return SearchSpace.model_validate(
        {
            "experiment": {"name": "plan", "corpora": {"synthetic": None}, "backbone": "embedded/tiny-whisper"},
            "search": {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}, "adapter.rank": {"choice": [4, 8, 16, 32]}},
            "tune": settings,
        }
    )


def index(utterances: int, directory: Path) -> None:
    """Shards without sound, 40 utterances a speaker."""
    directory.mkdir()
    names = []
    for start in range(0, utterances, 2048):
        numbers = np.arange(start, min(start + 2048, utterances))
        rows = {
            "utterance_id": [f"plan/{n:08d}" for n in numbers],
            "corpus": ["plan"] * len(numbers),
            "speaker": [f"plan/{n // 40}" for n in numbers],
            "emotion": [EMOTIONS[n % 7] for n in numbers],
            "path": [f"{n:08d}.wav" for n in numbers],
            "duration": [SECONDS] * len(numbers),
            "num_samples": [int(SECONDS * 16_000)] * len(numbers),
            "audio_sha256": [f"{n:064x}" for n in numbers],
            "audio": [b""] * len(numbers),
        }
        table = pa.table({name: rows.get(name, [None] * len(numbers)) for name in shards.SCHEMA.names}, shards.SCHEMA)
        shards.write_shard(table, directory / f"{start}.parquet")
        names.append(f"{start}.parquet")
    shards.write_manifest(directory, "plan", names, [], space().experiment.audio)


def task(utterances: int, directory: Path) -> None:
    """What the driver does first: the index and the fold, written for every process of a trial."""
    found = load_task(space().experiment, [directory])
    found.write(directory / "fold")
    assert found.rows("train").num_rows > utterances / 2


def fold(directory: Path) -> None:
    """What every process of a trial does first: it reads the fold and puts an epoch in order."""
    order.epoch(Task.read(directory / "fold").rows("train"), 120, (0, 1))


def prints(utterances: int, source: Path) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Fingerprints with the landmarks of real speech, in another order each; one shard of them at a time."""
    real = np.concatenate(list(fingerprint.read_fingerprints(source).values()))
    rng = np.random.default_rng(0)
    for start in range(0, utterances, 2048):
        ids = [f"{n:08d}" for n in range(start, min(start + 2048, utterances))]
        yield ids, [real[rng.integers(0, len(real), 250)] for _ in ids]


def control(trials: int, directory: Path) -> dict[str, float]:
    """A search with a trial on each of 64 GPUs, of 10 epochs of an hour, more or less, where ASHA lets them: all that
    the driver decides, and what the GPUs do meanwhile, by the clock of the simulation."""
    planned = space(trials=trials)
    known = Trials(directory, planned.search)
    searcher, halving = OptunaSearcher(planned, known), ReplayingASHA(planned, known)
    rng, running, now, busy, epochs = np.random.default_rng(0), [], 0.0, 0.0, 0
    numbers = itertools.count()
    while True:
        while len(running) < GPUS and isinstance(handed := searcher.suggest(name := f"t{next(numbers)}"), dict):
            trial = SimpleNamespace(trial_id=name, config=handed)
            known.start(handed["trial_id"])
            halving.on_trial_add(None, trial)
            heapq.heappush(running, (now + rng.uniform(0.8, 1.2), name, 1, rng.uniform(0.3, 0.7), trial))
        if not running:
            return {"hours": now, "busy": busy / (GPUS * now), "epochs": epochs}
        ends, name, epoch, start, trial = heapq.heappop(running)
        busy, now, epochs = busy + (len(running) + 1) * (ends - now), ends, epochs + 1
        uar, own = start + 0.02 * epoch, trial.config["trial_id"]
        record: dict[str, Any] = {"epoch": epoch, "dev_uar": uar, "best_dev_uar": uar, "best_epoch": epoch}
        record |= {"train_loss": 1.0, "seconds": 60.0, "peak_memory_mb": 1.0, "trainable_parameters": 1, "last": False}
        folder.append_history(directory / "trials" / own, record)
        known.update(own)
        searcher.on_trial_result(name, record)
        decision = halving.on_trial_result(None, trial, record)
        if epoch < 10 and decision == TrialScheduler.CONTINUE:
            heapq.heappush(running, (now + rng.uniform(0.8, 1.2), name, epoch + 1, start, trial))
            continue
        halving.on_trial_complete(None, trial, record)
        searcher.on_trial_complete(name, record)
        known.update(own, status="stopped" if epoch < 10 else "finished")


def part(name: str, size: int, source: Path, scratch: Path) -> dict[str, float]:
    """Processor seconds, the peak of memory in GiB, and what else one part says, in this process."""
    directory = scratch / f"{name}-{size}"
    if name == "task" and not directory.is_dir():
        index(size, directory)
    tables = audio(source) if name == "read" else None
    before, started = peak(), time.process_time()
    said: dict[str, float] = {}
    if name == "task":
        task(size, directory)
    elif name == "fold":
        fold(scratch / f"task-{size}")
    elif name == "audit":
        directory.mkdir()
        matching._same(prints(size, source), directory)
    elif tables is not None:
        for number in range(size):
            for packed in order.epoch(tables, 120, (0, number)):
                for _ in stream.batches(tables, packed):
                    pass
    else:
        said = control(size, directory)
    return said | {"seconds": time.process_time() - started, "gib": peak() - before}


def audio(source: Path) -> pa.Table:
    """The speech of a directory, in memory."""
    rows = shards.read_index([source])
    rows = rows.append_column("label", pa.array([0] * rows.num_rows, pa.int64()))
    return stream.Files(rows).hold().rows


def peak() -> float:
    """Of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(source: Path) -> None:
    """Print the page."""
    with tempfile.TemporaryDirectory() as scratch:

        def measure(name: str, size: int) -> dict[str, float]:
            command = [sys.executable, __file__, "--part", name, str(size), str(source), scratch]
            if name == "task":  # once to make the index, which is not what is measured
                subprocess.run(command, check=True, capture_output=True)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(name, size, done.stdout, file=sys.stderr)
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return found

        print(page(measure, shards.read_manifest(source)["hours"]))


def page(measure: Callable[[str, int], dict[str, float]], hours: float) -> str:
    """The table, as Markdown."""
    utterances = int(PLANNED * 3600 / SECONDS)
    rows = []
    for name, sizes, what in (
        ("task", (50_000, 200_000, 800_000), "the driver reads the index and makes the fold, once"),
        ("fold", (50_000, 200_000, 800_000), "a process of a trial reads the fold and puts an epoch in order"),
        ("audit", (40_000, 160_000), "the audit looks for versions of one take"),
    ):
        for size in sizes:
            found = measure(name, size)
            rows.append(f"| {what} | {size:,} utterances | {found['seconds']:.1f} | {found['gib']:.2f} |")
        rate = utterances / size
        end = (
            f"**{utterances:,} utterances, in proportion** | {found['seconds'] * rate:.0f} | {found['gib'] * rate:.1f}"
        )
        rows.append(f"| {what} | {end} |")
    for size in (100, 300, 1000):
        found = measure("control", size)
        rows.append(
            f"| the driver of {GPUS} trials at once decides | {size:,} trials, {found['epochs']:,.0f} epochs | "
            f"{found['seconds']:.1f} | {found['gib']:.2f} |"
        )
    copies = 4
    speech = copies * hours * 3600 / measure("read", copies)["seconds"]
    return "\n".join(
        [
            "# What grows",
            "",
            "```",
            "python tests/benchmarks/plan.py SHARDS > results/benchmarks/plan.md",
            "```",
            "",
            "Made-up indexes, fingerprints and trials. Seconds are of one core, busy; memory is what comes to the",
            "process, for the audit with what of its files is mapped into it: 750 bytes a second of fingerprints. "
            f"{PLANNED:,} hours in utterances of {SECONDS:g} s are {utterances:,}.",
            "",
            "| what | size | seconds | GiB |",
            "|---|---|---|---|",
            *rows,
            "",
            f"By the clock of the simulation the last search, an epoch in 0.8 to 1.2 hours, takes {found['hours']:.0f}",
            f"hours of {GPUS} GPUs, busy {found['busy']:.1%} of it: none waits for others; the last end alone.",
            "",
            f"One core makes batches of {speech:,.0f} seconds of speech a second from shards in memory"
            f" ({speech * 32e3 / 1e6:,.0f} MB of int16).",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1] == "--part":
        print(json.dumps(part(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))))
    else:
        main(Path(sys.argv[1]))
