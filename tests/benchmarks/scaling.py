"""Preparation and a search on one node and on two, of one core each: cluster/up.sh over network namespaces.

    python tests/benchmarks/scaling.py RAVDESS [SCRATCH] > results/benchmarks/scaling.md        # as root

Every node is a namespace with an address of its own and every process on it is bound to one core, so that a second
node brings a second core. What one core does for both (the driver, Ray's head) stays on the first node, as on a real
cluster. Speech is RAVDESS as 48 kHz WAV (tests/benchmarks/prepare.py), the search the embedded demo's with a fixed
number of whole trials. One node and two take turns, several rounds; medians count.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prepare

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests" / "cluster"))
import network_fixture as network  # noqa: E402 (it lies among the tests)

ROUNDS = 2
TRIALS = 6
SHORT = 2
"""Trials of a shorter search: what the others take beyond it is their own time, without what starts once."""


@contextmanager
def cluster(nodes: int, home: Path) -> Iterator[dict[str, str]]:
    """One that up.sh started; yields the environment in which a command on the first node joins it."""
    into = home / "into"
    into.write_text(
        '#!/bin/bash\nhost=$1; shift\nexec ip netns exec "sr-$host" taskset -c $((${host#n} - 1)) bash -c "$*"\n'
    )
    into.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "XDG_STATE_HOME")}
    env |= {"HOME": str(home), "SER_RAY_SSH": str(into), "SER_RAY_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(CHECKOUT), "RAY_AUTH_MODE": "token", "XDG_CACHE_HOME": str(home / "cache")}
    names = [f"n{number}" for number in range(1, nodes + 1)]
    subprocess.run([CHECKOUT / "cluster" / "up.sh", *names], env=env, check=True, capture_output=True)
    try:
        yield env | {"RAY_ADDRESS": f"{network.address(1)}:6379"}
    finally:
        subprocess.run([CHECKOUT / "cluster" / "down.sh"], env=env, check=True, capture_output=True)


def timed(env: dict[str, str], *arguments: str) -> float:
    """Seconds that one command of ours takes on the first node's core."""
    command = network.inside(1, "taskset", "-c", "0", sys.executable, "-m", "ser_ray", *arguments)
    started = time.monotonic()
    done = subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return time.monotonic() - started


def measure(nodes: int, corpus: Path, home: Path, number: int) -> dict[str, float]:
    """Seconds of each command on a fresh cluster of so many nodes."""
    results = f"storage.results={home}/results"
    found: dict[str, float] = {}
    with cluster(nodes, home) as env:
        for copies in (1, prepare.COPIES):
            cache = home / f"cache-{nodes}-{number}-{copies}"
            given = f"experiment.corpora={{copies: {corpus / f'{copies}.csv'}}}"
            arguments = ["search_spaces/demo.yaml", given, results, f"storage.cache={cache}"]
            found[f"prepare {copies}"] = timed(env, "prepare", *arguments)
        for trials in (SHORT, TRIALS):
            arguments = [
                "search_spaces/demo.yaml", results, f"storage.cache={home}/cache-demo", f"tune.trials={trials}",
                f"experiment.name=demo-{nodes}-{number}-{trials}", "tune.scheduler=none", "experiment.epochs=4",
                "experiment.backbone=embedded/tiny-whisper", "experiment.adapter.method=full",
                "experiment.head.speaker=none",
            ]  # fmt: skip
            found[f"tune {trials}"] = timed(env, "tune", *arguments)
    return found


def main(source: Path, scratch: Path) -> None:
    """Print the page."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory, network.hosts(2):
        home = Path(directory)
        hours = prepare.upsample(source, home / "corpus")
        subprocess.run(
            [sys.executable, "-m", "ser_ray", "prepare", "search_spaces/demo.yaml", f"storage.cache={home}/cache-demo"],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
        )
        found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for number in range(ROUNDS):
            for nodes in (1, 2) if number % 2 == 0 else (2, 1):
                found[nodes].append(measure(nodes, home / "corpus", home, number))
                print(nodes, found[nodes][-1], file=sys.stderr)
    print(page(found, hours))


def page(found: dict[int, list[dict[str, float]]], hours: float) -> str:
    """The table, as Markdown."""
    rows = {
        f"prepare {hours:.1f} h of speech": lambda seconds: seconds["prepare 1"],
        f"prepare {prepare.COPIES * hours:.1f} h": lambda seconds: seconds[f"prepare {prepare.COPIES}"],
        "an hour of speech more": lambda s: (
            (s[f"prepare {prepare.COPIES}"] - s["prepare 1"]) / ((prepare.COPIES - 1) * hours)
        ),
        f"tune, {SHORT} trials, with evaluation and report": lambda seconds: seconds[f"tune {SHORT}"],
        f"tune, {TRIALS} trials": lambda seconds: seconds[f"tune {TRIALS}"],
        "a trial more": lambda seconds: (seconds[f"tune {TRIALS}"] - seconds[f"tune {SHORT}"]) / (TRIALS - SHORT),
    }
    lines = [
        "# One node and two, of one core each",
        "",
        "```",
        "python tests/benchmarks/scaling.py RAVDESS > results/benchmarks/scaling.md",
        "```",
        "",
        "Network namespaces on one machine, every process of a node bound to its core; `cluster/up.sh` starts Ray on",
        f"both, commands run on the first. {ROUNDS} rounds in turn, median [lowest, highest] of the seconds; the whole",
        "command each, from the start of Python on, and what a further hour or trial adds, where what starts once is",
        "subtracted. The second node shares memory, disk and caches with the first: this shows what our scheduling",
        "costs, not what a network does. With one node a trial's core also runs the driver and Ray's head, so that a",
        "second one can more than double a search. Rows of what a further hour or trial adds are differences of noisy",
        "numbers: the whole commands are what counts.",
        "",
        "| | 1 node | 2 nodes | times as fast |",
        "|---|---|---|---|",
    ]
    for name, of in rows.items():
        one, two = ([of(seconds) for seconds in found[nodes]] for nodes in (1, 2))
        cells = [f"{statistics.median(v):.1f} [{min(v):.1f}, {max(v):.1f}]" for v in (one, two)]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {statistics.median(one) / statistics.median(two):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.gettempdir()))
