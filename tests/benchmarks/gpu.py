"""Speed and memory of LoRA, QLoRA and full fine-tuning at the size of large backbones, beside transformers' Trainer.

    python tests/benchmarks/gpu.py > results/benchmarks/gpu.md
    python tests/benchmarks/gpu.py --size tiny --device cpu      # tries the script itself, in a minute

No network, no Ray: backbones of random weights in the shapes of wav2vec2-large (24 blocks, 1024 wide) and Whisper
large-v3's encoder (32 blocks, 1280 wide, 128 mel bands), written to a temporary directory; synthetic waveforms of 1 to
6 s, in memory. Our side is `training.loop.fit` with `speech.stream`, as trials run it; the other side is trainer.py.
Every run trains one epoch that is not timed, in which operations are counted, and then epochs that are. Rounds take all
ways in turn; medians count. --backbones and --rounds make it shorter.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
import trainer
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ser_ray.config import Experiment
from ser_ray.models.classifier import build
from ser_ray.models.precision import compute_dtype
from ser_ray.runtime import feed
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import stream
from ser_ray.speech.audio import to_int16
from ser_ray.training import loop

METHODS: Final = ("lora", "qlora", "full")
EMOTIONS: Final = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprised")
BATCH_SECONDS: Final = 120


@dataclass(frozen=True)
class Shape:
    """Of an encoder."""

    blocks: int
    width: int
    heads: int
    front: int
    """Mel bands, or channels of the convolutions over the waveform."""


@dataclass(frozen=True)
class Size:
    """How much of everything; ``matrix``: rows and columns of what the device's throughput is measured with."""

    utterances: int
    timed_epochs: int
    matrix: int
    shapes: dict[str, Shape]


SIZES: Final = {
    "large": Size(256, 2, 8192, {"wav2vec2": Shape(24, 1024, 16, 512), "whisper": Shape(32, 1280, 20, 128)}),
    "tiny": Size(8, 1, 512, {"wav2vec2": Shape(2, 32, 2, 16), "whisper": Shape(2, 32, 2, 80)}),
}


@dataclass(frozen=True)
class Measured:
    """One run."""

    utterances_per_s: float
    memory_mb: float
    flops_per_s: float


Way = Callable[[Experiment], Measured]
Row = tuple[str, str, str]
"""Backbone, method, way."""


def write_backbone(family: str, shape: Shape, directory: Path) -> Path:
    """Random weights of one family in transformers' layout, in bf16, which halves what is written and held."""
    if family == "whisper":
        config = transformers.WhisperConfig(
            d_model=shape.width,
            encoder_layers=shape.blocks,
            encoder_attention_heads=shape.heads,
            encoder_ffn_dim=4 * shape.width,
            num_mel_bins=shape.front,
        )
        model, extractor = WhisperEncoder(config), transformers.WhisperFeatureExtractor(feature_size=shape.front)
    else:
        config = transformers.Wav2Vec2Config(
            hidden_size=shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            conv_dim=[shape.front] * 7,
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
        model = transformers.Wav2Vec2Model(config)
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    extractor.save_pretrained(directory)
    return directory


def speech(count: int) -> list[trainer.Utterance]:
    """Noise with an envelope, 1 to 6 s."""
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(count):
        samples = int(rng.uniform(1, 6) * SAMPLING_RATE)
        envelope = np.sin(np.arange(samples, dtype=np.float32) / SAMPLING_RATE * 2 * np.pi * rng.uniform(1, 4)) ** 2
        waveform = 0.1 * envelope * rng.standard_normal(samples, dtype=np.float32)
        utterances.append((waveform, number % len(EMOTIONS)))
    return utterances


def as_table(utterances: list[trainer.Utterance]) -> pa.Table:
    """As the shards give them."""
    return pa.table(
        {
            "utterance_id": [f"synthetic/{number:04d}" for number in range(len(utterances))],
            "num_samples": pa.array([len(waveform) for waveform, _ in utterances], pa.int32()),
            "audio": pa.array([to_int16(waveform).tobytes() for waveform, _ in utterances], pa.large_binary()),
            "label": pa.array([label for _, label in utterances], pa.int64()),
            "corpus": ["synthetic"] * len(utterances),
            "shard": pa.array(["synthetic"] * len(utterances)).dictionary_encode(),
            "row": pa.array(range(len(utterances)), pa.int32()),
        }
    )


def ours(experiment: Experiment, utterances: list[trainer.Utterance], device: torch.device) -> Measured:
    """`loop.fit`; an epoch is timed from the call for its batches to the call for dev's, which is one utterance."""
    table, counter = as_table(utterances), trainer.operations()
    starts: list[float] = []
    seconds: list[float] = []
    records: list[loop.Record] = []
    own = feed.data(experiment, stream.Held(table), stream.Held(table.slice(0, 1)), stream.SPEECH)
    with ExitStack() as counting:

        def train(epoch: int) -> Iterable[stream.Batch]:
            if epoch == 1:
                counting.enter_context(counter)
            starts.append(trainer.now(device))
            return own.train(epoch)

        def dev() -> Iterable[stream.Batch]:
            seconds.append(trainer.now(device) - starts[-1])
            counting.close()
            return own.dev()

        data = replace(own, train=train, dev=dev)
        loop.fit(build(experiment, device), data, lambda record, save: records.append(record))
    assert all(np.isfinite(record["train_loss"]) for record in records)
    rate = (len(seconds) - 1) * len(utterances) / sum(seconds[1:])
    flops = counter.get_total_flops() / len(utterances)
    return Measured(rate, records[-1]["peak_memory_mb"], flops * rate)


def theirs(
    experiment: Experiment, utterances: list[trainer.Utterance], device: torch.device, batch_size: int, grouped: bool
) -> Measured:
    """transformers' Trainer; on a GPU with four processes that put batches together."""
    outcome = trainer.run(
        experiment,
        utterances,
        utterances[:1],
        batch_size=batch_size,
        group_by_length=grouped,
        warm_up=-(-len(utterances) // batch_size),
        count_flops=True,
        workers=4 if device.type == "cuda" else 0,
        device=device,
    )
    assert np.isfinite(outcome.train_loss)
    assert outcome.flops_per_utterance is not None
    rate = outcome.utterances_per_s
    return Measured(rate, outcome.peak_memory_mb, outcome.flops_per_utterance * rate)


def ways(family: str, utterances: list[trainer.Utterance], device: torch.device) -> dict[str, Way]:
    """What is compared; grouping by length means nothing where all are padded to 30 s."""
    grouped = family != "whisper"
    large = "Trainer, 32 utterances a batch" + (", grouped by length" if grouped else "")
    return {
        f"ser_ray, {BATCH_SECONDS} s a batch": partial(ours, utterances=utterances, device=device),
        "Trainer, 8 utterances a batch": partial(
            theirs, utterances=utterances, device=device, batch_size=8, grouped=False
        ),
        large: partial(theirs, utterances=utterances, device=device, batch_size=32, grouped=grouped),
    }


def attempt(way: Way, experiment: Experiment, device: torch.device) -> Measured | None:
    """None where the device's memory does not hold it; whatever else goes wrong is raised."""
    trainer.fresh_memory(device)
    try:
        return way(experiment)
    except torch.OutOfMemoryError:
        return None


def throughput(matrix: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of two square matrices: the best of several."""
    left, right = (torch.randn(matrix, matrix, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = trainer.now(device)
        for _ in range(8):
            left @ right
        best = min(best, (trainer.now(device) - started) / 8)
    return 2 * matrix**3 / best


def row(name: Row, runs: list[Measured | None], peak: float) -> str:
    """Medians over the rounds."""
    whole = [run for run in runs if run is not None]
    if len(whole) < len(runs):
        return f"| {' | '.join(name)} | out of memory | | |"
    rate, memory, flops = (
        statistics.median(getattr(run, figure) for run in whole)
        for figure in ("utterances_per_s", "memory_mb", "flops_per_s")
    )
    return f"| {' | '.join(name)} | {rate:.1f} | {memory / 1024:.2f} | {flops / peak:.2g} |"


def measure(size: Size, families: list[str], rounds: int, device: torch.device) -> dict[Row, list[Measured | None]]:
    """Every way, round after round; what is measured is said as it comes, on stderr."""
    found: dict[Row, list[Measured | None]] = {}
    utterances = speech(size.utterances)
    for family in families:
        with tempfile.TemporaryDirectory() as scratch:
            backbone = write_backbone(family, size.shapes[family], Path(scratch) / family)
            for _ in range(rounds):
                for method in METHODS:
                    for name, way in ways(family, utterances, device).items():
                        started = time.perf_counter()
                        run = attempt(way, experiment(backbone, method, 1 + size.timed_epochs), device)
                        found.setdefault((family, method, name), []).append(run)
                        took = f"{time.perf_counter() - started:.0f} s"
                        print(family, method, name, run, took, sep=", ", file=sys.stderr, flush=True)
    return found


def experiment(backbone: Path, method: str, epochs: int) -> Experiment:
    """The shipped defaults but for the size of a batch."""
    return Experiment.model_validate(
        {
            "name": "gpu",
            "corpora": {"synthetic": None},
            "emotions": EMOTIONS,
            "backbone": str(backbone),
            "adapter": {"method": method},
            "batch_seconds": BATCH_SECONDS,
            "epochs": epochs,
            "patience": epochs,
        }
    )


def heading(arguments: argparse.Namespace, size: Size, device: torch.device, dtype: torch.dtype, peak: float) -> str:
    """What the figures are of."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    memory = "what torch allocated at most" if on_gpu else "the process's largest resident size so far"
    precision = str(dtype).removeprefix("torch.")
    title = "Large backbones on a GPU" if arguments.size == "large" and on_gpu else "A trial of the script: no figures"
    shapes = "; ".join(f"{f}: {s.blocks} blocks, {s.width} wide" for f, s in size.shapes.items())
    return f"""# {title}

```
{" ".join(["python", "tests/benchmarks/gpu.py", *arguments.given])}
```

{name}, {os.cpu_count()} cores; torch {torch.__version__}, transformers {transformers.__version__}; {precision},
gradient checkpointing off. Random weights ({shapes}).
{size.utterances} synthetic utterances of 1 to 6 s; one epoch that is not timed, then {size.timed_epochs}; medians of \
{arguments.rounds} rounds.

Peak memory: {memory}. Share: operations (counted, padding included) over seconds, of the {peak / 1e12:.3g} TFLOP/s that
a product of two {size.matrix} x {size.matrix} {precision} matrices reached in the same run. A larger share is not more
speed: Trainer pads Whisper's input to 30 s, and computes on it.

| backbone | method | way | utterances/s | peak memory, GiB | share of matrix throughput |
|---|---|---|---|---|---|"""


def main(given: list[str]) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="large")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backbones", nargs="+", choices=("wav2vec2", "whisper"), default=["wav2vec2", "whisper"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(given, argparse.Namespace(given=given))
    size, device = SIZES[arguments.size], torch.device(arguments.device)
    transformers.utils.logging.set_verbosity_error()
    if arguments.size == "tiny":
        torch.set_num_threads(1)  # they cost more than they bring
    torch.manual_seed(0)
    dtype = compute_dtype("auto", device)
    peak = throughput(size.matrix, dtype, device)
    found = measure(size, arguments.backbones, arguments.rounds, device)
    print(heading(arguments, size, device, dtype, peak))
    for name, runs in found.items():
        print(row(name, runs, peak))


if __name__ == "__main__":
    main(sys.argv[1:])
