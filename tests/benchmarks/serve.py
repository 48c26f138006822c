"""What does a server answer, with batches and without, beside one process that predicts in a loop?

    python tests/benchmarks/serve.py CHECKPOINT AUDIO_DIR --requests 2000 --endurance 20000 \\
        > results/benchmarks/serve.md

Clients in a process of their own ask POST / for recordings of AUDIO_DIR, each the next one as soon as it has its
answer. Three ways in turn: `ser-ray serve`; the same without batches, where the model answers one request after the
other; and without a server, `predict` of one recording after the other in one process. Every answer is compared with
that of `predict`. Then so many requests more, during which the memory of the server is read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from server_fixture import Server, recordings_of, serving

CLIENTS: Final = (1, 8, 64)
TOLERANCE: Final = 1e-5
LOOKS: Final = 10
"""How often the memory is read during the long run."""
UNBATCHED: Final = (
    "import sys; from ser_ray import serve; from ser_ray.serving import settings; made = settings.Settings; "
    "serve.Settings = lambda **given: made(**given, batched=False); from ser_ray.__main__ import main; "
    "sys.exit(main(sys.argv[1:]))"
)
"""The command with the one setting that has no option, as it is for this comparison."""


def main() -> int:
    """Print the page; 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("audio", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--endurance", type=int, default=20_000)
    parser.add_argument("--recordings", type=int, default=64)
    given = parser.parse_args()
    paths = recordings_of(given.audio, given.recordings)
    recordings = [path.read_bytes() for path in paths]
    in_loop, expected, seconds = one_process(given.checkpoint, paths, given.requests)
    command = ["serve", given.checkpoint, "--replicas", "1"]
    rows, memory, differences = [], [], []
    for way, program in (
        ("batches", [sys.executable, "-m", "ser_ray", *command]),
        ("no batches", [sys.executable, "-c", UNBATCHED, *command]),
    ):
        with serving(program) as server:
            asked(server, recordings, 8, len(recordings))  # as a warm-up
            for clients in CLIENTS:
                measured, difference = asked(server, recordings, clients, given.requests, expected)
                rows.append((way, clients, *measured))
                differences.append(difference)
            if way == "batches":
                memory, difference = endured(server, recordings, given.endurance, expected)
                differences.append(difference)
    print(page(given, len(paths), seconds, [*rows, ("one process, a loop", 1, *in_loop)], memory, max(differences)))
    return int(max(differences) > TOLERANCE)


def one_process(
    checkpoint: str, paths: Sequence[Path], requests: int
) -> tuple[tuple[float, ...], list[dict[str, float]], float]:
    """`predict` of one recording after the other: figures, the answers, and the mean length of a recording."""
    import ser_ray
    from ser_ray.speech.audio import load_recording

    model = ser_ray.load(checkpoint, device="cpu")
    rows = [list(model.predict(path))[-1] for path in paths]
    expected = [{emotion: row[f"p_{emotion}"] for emotion in model.emotions} for row in rows]
    audio = model.classifier.experiment.audio.model_copy(update={"too_long": "split"})
    lengths = [sum(map(len, load_recording(path, audio).windows)) / 16_000 for path in paths]
    begun, times = time.perf_counter(), []
    for number in range(requests):
        before = time.perf_counter()
        list(model.predict(paths[number % len(paths)]))
        times.append(time.perf_counter() - before)
    return figures(times, time.perf_counter() - begun), expected, float(np.mean(lengths))


def figures(times: Sequence[float], total: float) -> tuple[float, ...]:
    """Answers a second, and p50, p95 and p99 in ms."""
    return (len(times) / total, *(1000 * np.percentile(times, (50, 95, 99))))


def asked(
    server: Server, recordings: list[bytes], clients: int, requests: int, expected: list[dict[str, float]] | None = None
) -> tuple[tuple[float, ...], float]:
    """Figures of so many clients, and the largest difference of a probability; the clients are another process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        times, total, answers = pool.apply(_clients, (server.port, recordings, clients, requests))
    difference = 0.0
    for number, answer in answers if expected else ():
        theirs = expected[number]
        difference = max(difference, *(abs(one["score"] - theirs[one["label"]]) for one in json.loads(answer)))
    return figures(times, total), difference


def endured(
    server: Server, recordings: list[bytes], requests: int, expected: list[dict[str, float]]
) -> tuple[list[tuple[int, dict[str, float]]], float]:
    """The memory of the server's parts after each tenth of many requests."""
    found, worst = [(0, server.megabytes())], 0.0
    for part in range(1, LOOKS + 1):
        _, difference = asked(server, recordings, 64, requests // LOOKS, expected)
        worst = max(worst, difference)
        found.append((part * (requests // LOOKS), server.megabytes()))
    return found, worst


def _clients(
    port: int, recordings: list[bytes], clients: int, requests: int
) -> tuple[list[float], float, list[tuple[int, bytes]]]:
    """Each asks for the next recording as soon as it has an answer, over one connection that stays open."""
    numbers, times, answers = iter(range(requests)), [], []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            place = number % len(recordings)
            body, before = recordings[place], time.perf_counter()
            writer.write(b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            status, content = await _answer(reader)
            assert status == 200, content
            times.append(time.perf_counter() - before)
            answers.append((place, content))
        writer.close()

    async def all_of_them() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - begun

    return times, asyncio.run(all_of_them()), answers


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


def page(
    given: argparse.Namespace,
    recordings: int,
    seconds: float,
    rows: Sequence[tuple[Any, ...]],
    memory: Sequence[tuple[int, dict[str, float]]],
    difference: float,
) -> str:
    """As Markdown."""
    import torch

    best = {(way, clients): rate for way, clients, rate, *_ in rows}
    ratio = best["batches", 64] / best["no batches", 64]
    lines = [
        "# A server",
        "",
        "```",
        "python tests/benchmarks/serve.py CHECKPOINT AUDIO_DIR "
        f"--requests {given.requests} --endurance {given.endurance} > results/benchmarks/serve.md",
        "```",
        "",
        *(__doc__ or "").strip().split("\n\n")[2].splitlines(),
        "",
        f"{recordings} recordings, {seconds:.2f} s each on average without silence; {os.cpu_count()} CPU cores, which",
        f"the clients use too; torch {torch.__version__}, fp32.",
        "",
        "| way | clients | utterances/s | p50, ms | p95, ms | p99, ms |",
        "|---|---|---|---|---|---|",
        *(f"| {w} | {c} | {r:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f} |" for w, c, r, p50, p95, p99 in rows),
        "",
        f"With batches {ratio:.2f} times the utterances of 64 clients without. Largest difference of a probability to",
        f"`predict`, over all answers: {difference:.1e}.",
        "",
        "| requests, 64 clients | " + " | ".join(f"{name}, MB" for name in memory[0][1]) + " |",
        "|---|" + "---|" * len(memory[0][1]),
        *(f"| {n} | " + " | ".join(f"{value:.0f}" for value in held.values()) + " |" for n, held in memory),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
