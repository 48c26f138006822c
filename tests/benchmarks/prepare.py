"""How fast speech is prepared, beside the bare loop that it is made of: soundfile and soxr, on one core and on two.

    python tests/benchmarks/prepare.py CORPUS [SCRATCH] > results/benchmarks/prepare.md

CORPUS: recordings under RAVDESS's names; they are written again as 48 kHz WAV below SCRATCH, as the corpus is
published, and linked `COPIES` times over under other names. Every way runs over one copy and over all of them, several
rounds in turn, so that a busy machine slows all alike; medians count. What the further copies add is the steady state.
"""

from __future__ import annotations

import csv
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import soundfile
import soxr

ROUNDS = 5
COPIES = 4
RATE = 48_000


def upsample(source: Path, target: Path) -> float:
    """Write every recording as 16 bit WAV at 48 kHz, and tables of one copy and of all; returns hours a copy."""
    seconds = 0.0
    rows: list[tuple[str, str, str]] = []
    for path in sorted(source.rglob("*.flac")) + sorted(source.rglob("*.wav")):
        waveform, rate = soundfile.read(path)
        copy = target / "0" / path.with_suffix(".wav").name
        copy.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(copy, soxr.resample(waveform, rate, RATE), RATE, subtype="PCM_16")
        rows.append((copy.name, path.stem[-2:], "neutral"))
        seconds += len(waveform) / rate
    for number in range(1, COPIES):
        (target / str(number)).mkdir()
        for name, _, _ in rows:
            (target / str(number) / name).hardlink_to(target / "0" / name)
    for copies in (1, COPIES):
        with (target / f"{copies}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "speaker", "emotion"))
            writer.writerows((f"{number}/{name}", *rest) for number in range(copies) for name, *rest in rows)
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

    from ser_ray import config
    from ser_ray.prepare import prepare
    from ser_ray.runtime import cluster, paths

    corpus, cache = scratch / "ravdess48k", scratch / "cache"
    hours = upsample(source, corpus)
    files = {n: [str(p) for k in range(n) for p in sorted((corpus / str(k)).iterdir())] for n in (1, COPIES)}
    cache.mkdir()
    quiet = Console(file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 (for the whole run)
    cluster.connect()
    pool = multiprocessing.get_context("spawn").Pool(2)

    def ours(copies: int, use_ray: bool) -> None:
        own = tempfile.mkdtemp(dir=cache)  # a cache of its own; removing it is no part of the work
        overrides = [f"experiment.corpora={{bench: {corpus}/{copies}.csv}}", f"storage.cache={own}"]
        space = paths.resolve_paths(config.load(config.default_space(), overrides))
        prepare(space, use_ray=use_ray, console=quiet)

    ways: dict[str, Callable[[int], object]] = {
        "bare loop, 1 process": lambda n: [decode(path) for path in files[n]],
        "bare loop, 2 processes": lambda n: list(pool.imap_unordered(decode, files[n], chunksize=16)),
        "prepare, in this process": lambda n: ours(n, False),
        "prepare, on Ray": lambda n: ours(n, True),
    }
    for work in ways.values():  # imports, compilation, worker processes
        work(1)
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for name in ways for n in files}
    for _ in range(ROUNDS):
        for name, n in found:
            found[name, n].append(seconds_of(partial(ways[name], n)))
            for made in cache.iterdir():
                shutil.rmtree(made)
    peaks = {(name, n): memory_of(partial(ways[name], n)) for name, n in found}
    pool.terminate()
    seconds = {key: statistics.median(runs) for key, runs in found.items()}
    print("# Preparing speech\n\n```\npython tests/benchmarks/prepare.py CORPUS > results/benchmarks/prepare.md\n```\n")
    print(
        f"RAVDESS as 48 kHz WAV: {len(files[1])} recordings, {hours * 60:.0f} minutes, once and {COPIES} times; "
        f"{psutil.cpu_count()} cores ({platform.processor() or platform.machine()}); medians of {ROUNDS} rounds in\n"
        "turn, after one that does not count. The bare loop reads, downmixes and resamples; prepare also checks,\n"
        "trims, hashes and writes shards. Steady state: what the further copies add to the first, hours to seconds.\n"
        "Memory: proportional set size of the command and its children (Ray included), sampled twice a second\n"
        "in another run.\n"
    )
    print(
        f"| way | seconds, once | seconds, {COPIES} times | steady state, hours of audio a minute "
        f"| of the bare loop on 2 | peak memory, GiB: once | {COPIES} times |\n|---|---|---|---|---|---|---|"
    )
    added = {name: seconds[name, COPIES] - seconds[name, 1] for name in ways}
    for name in ways:
        ratio, rate = added["bare loop, 2 processes"] / added[name], hours * (COPIES - 1) / added[name] * 60
        columns = (f"{seconds[name, 1]:.1f}", f"{seconds[name, COPIES]:.1f}", f"{rate:.1f}", f"{ratio:.2f}")
        print(f"| {' | '.join((name, *columns))} | {peaks[name, 1]:.2f} | {peaks[name, COPIES]:.2f} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as directory:
        main(Path(sys.argv[1]).resolve(), Path(directory))
