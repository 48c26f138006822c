"""How fast speech is prepared, beside the bare loop that it is made of: soundfile and soxr, on one core and on two.

    python tests/benchmarks/prepare.py CORPUS [SCRATCH] > results/benchmarks/prepare.md

CORPUS: recordings under RAVDESS's names; they are written again as 48 kHz WAV below SCRATCH, as the corpus is
published. Every way runs three times in turn, so that a busy machine slows all alike; the median counts.
"""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import soundfile
import soxr

ROUNDS = 5
RATE = 48_000


def upsample(source: Path, target: Path) -> float:
    """Write every recording as 16 bit WAV at 48 kHz; returns hours of audio."""
    seconds = 0.0
    for path in sorted(source.rglob("*.flac")) + sorted(source.rglob("*.wav")):
        waveform, rate = soundfile.read(path)
        copy = target / path.relative_to(source).with_suffix(".wav")
        copy.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(copy, soxr.resample(waveform, rate, RATE), RATE, subtype="PCM_16")
        seconds += len(waveform) / rate
    return seconds / 3600


def decode(path: str) -> int:
    """The bare work: read, downmix, resample; nothing is checked, trimmed or written."""
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return len(soxr.resample(waveform.mean(axis=1), rate, 16_000))


class Memory(threading.Thread):
    """The largest sum of this process's and its children's proportional memory while it runs, in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total / 2**30)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_of(work: Callable[[], object]) -> float:
    """Peak, in GiB; in a run of its own, since reading it takes a core."""
    memory = Memory()
    memory.start()
    work()
    memory.ended.set()
    memory.join()
    return memory.peak


def main(source: Path, scratch: Path) -> None:
    """Print the table as Markdown."""
    from rich.console import Console

    from ser_ray import cluster, config
    from ser_ray.prepare import prepare

    corpus, cache = scratch / "ravdess48k", scratch / "cache"
    hours = upsample(source, corpus)
    files = [str(path) for path in sorted(corpus.rglob("*.wav"))]
    overrides = [f"experiment.corpora={{ravdess: {corpus}}}", f"storage.cache={cache}"]
    space = cluster.settle_paths(config.load(config.default_space(), overrides))
    quiet = Console(file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 (for the whole run)
    cluster.connect()
    pool = multiprocessing.get_context("spawn").Pool(2)

    def ours(use_ray: bool) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        prepare(space, use_ray=use_ray, console=quiet)

    ways: dict[str, Callable[[], object]] = {
        "bare loop, 1 process": lambda: [decode(path) for path in files],
        "bare loop, 2 processes": lambda: list(pool.imap_unordered(decode, files, chunksize=16)),
        "prepare, in this process": lambda: ours(False),
        "prepare, on Ray": lambda: ours(True),
    }
    for work in ways.values():  # imports, compilation, worker processes
        work()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            found[name].append(seconds_of(work))
    peaks = {name: memory_of(work) for name, work in ways.items()}
    pool.terminate()
    seconds = {name: statistics.median(runs) for name, runs in found.items()}
    print("# Preparing speech\n\n```\npython tests/benchmarks/prepare.py CORPUS > results/benchmarks/prepare.md\n```\n")
    print(
        f"RAVDESS as 48 kHz WAV: {len(files)} recordings, {hours * 60:.0f} minutes; {psutil.cpu_count()} cores "
        f"({platform.processor() or platform.machine()}); medians of {ROUNDS} rounds in turn, after one that does not "
        "count. The bare loop reads, downmixes and resamples; prepare also checks, trims, hashes and writes shards.\n"
        "Memory: proportional set size of the command and its children (Ray included), sampled twice a second\n"
        "in another run.\n"
    )
    print(
        "| way | seconds | hours of audio a minute | of the bare loop on 2 | peak memory, GiB |\n|---|---|---|---|---|"
    )
    for name, taken in seconds.items():
        ratio, rate = seconds["bare loop, 2 processes"] / taken, hours / taken * 60
        print(f"| {name} | {taken:.1f} | {rate:.1f} | {ratio:.2f} | {peaks[name]:.2f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as directory:
        main(Path(sys.argv[1]).resolve(), Path(directory))
