"""What can batches gain at most, on this machine? The model of a server alone, without HTTP and without decoding.

    python tests/benchmarks/batching.py CHECKPOINT AUDIO_DIR > results/benchmarks/batching.md

Windows of AUDIO_DIR are answered by the function that a replica of `ser-ray serve` calls, in batches of several sizes,
all sizes in turn for some rounds; the medians are of these. Windows of like length are together, as in a server whose
queue is full. CPU ms are those of all threads. What a batch gains is what a call costs beside its arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from server_fixture import recordings_of

from ser_ray.models import checkpoint
from ser_ray.serving.answering import Job, Known, answer
from ser_ray.speech.audio import load_recording, to_int16

SIZES: Final = (1, 8, 32)
ROUNDS: Final = 5


def main() -> int:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("audio", type=Path)
    parser.add_argument("--recordings", type=int, default=64)
    given = parser.parse_args()
    model = checkpoint.load(given.checkpoint, "cpu")
    paths = recordings_of(given.audio, given.recordings)
    windows = [to_int16(window) for path in paths for window in load_recording(path, model.experiment.audio).windows]
    known = [Known(Job("", (window,)), model, None, "") for window in sorted(windows, key=len)]
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
        for _ in range(ROUNDS):
            for size in SIZES:
                found[size].append(measured(known, size))
        alone = statistics.median(rate for rate, _ in found[1])
        for size, each in found.items():
            rate, cpu = (statistics.median(values) for values in zip(*each, strict=True))
            rows.append(f"| {threads} | {size} | {rate:.1f} | {rate / alone:.2f} | {cpu:.1f} |")
    print(
        "\n".join(
            [
                "# Batches",
                "",
                "```",
                "python tests/benchmarks/batching.py CHECKPOINT AUDIO_DIR > results/benchmarks/batching.md",
                "```",
                "",
                *(__doc__ or "").strip().split("\n\n")[2].splitlines(),
                "",
                f"{model.experiment.name}, {model.experiment.backbone}; {len(known)} windows, "
                f"{np.mean([len(window) for window in windows]) / 16_000:.2f} s each on average; "
                f"torch {torch.__version__}, fp32.",
                "",
                "| threads | windows in a batch | windows/s | of the rate of one | CPU ms a window |",
                "|---|---|---|---|---|",
                *rows,
            ]
        )
    )
    return 0


def measured(known: list[Known], size: int) -> tuple[float, float]:
    """Windows a second, and CPU milliseconds of one, when all are answered once."""
    begun, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(known), size):
        answer(known[first : first + size])
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    return len(known) / seconds, 1000 * cpu / len(known)


if __name__ == "__main__":
    sys.exit(main())
