"""What one process of gpu.py measures: training steps of a large backbone, each cell a line of JSON as soon as it is
known.

    python tests/benchmarks/gpu_cells.py ROWS.jsonl '[{"family": "whisper", "method": "lora", "seconds": 120}]'

A cell that runs out of memory, or fails in another way, is a line that says so, and the next cell follows.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

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

EMOTIONS: Final = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprised")
SHAPES: Final = {
    "large": {"wav2vec2": (24, 1024, 16, 512), "wavlm": (24, 1024, 16, 512), "whisper": (32, 1280, 20, 128)},
    "tiny": {"wav2vec2": (2, 32, 2, 16), "wavlm": (2, 32, 2, 16), "whisper": (2, 32, 2, 80)},
}
"""Blocks, width, heads; mel bands, or channels of the convolutions over the waveform."""
UTTERANCES: Final = {"large": 256, "tiny": 8}
TRAINERS_UTTERANCES: Final = {"large": 96, "tiny": 8}
"""Fewer: Trainer pads Whisper's input to 30 s."""
MATRIX: Final = {"large": 8192, "tiny": 256}
"""Rows and columns of what the device's throughput is measured with."""
EVEN_SECONDS: Final = 3.5

Cell = dict[str, Any]
"""way (ser_ray by default, or trainer), family, method, seconds (a batch), and a switch by its name."""


def main(rows: Path, cells: list[Cell], device: torch.device, size: str) -> None:
    """Measure the cells in order."""
    transformers.utils.logging.set_verbosity_error()
    backbones: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells:
            started = time.perf_counter()
            trainer.fresh_memory(device)
            try:
                if cell.get("way") == "matrix":
                    found: Cell = {"flops_per_s": throughput(MATRIX[size], compute_dtype("auto", device), device)}
                else:
                    family = cell["family"]
                    if family not in backbones:
                        place = Path(scratch) / family
                        backbones[family] = write_backbone(family, SHAPES[size][family], place, device)
                    found = measured(cell, backbones[family], device, size)
            except Exception as error:
                short = isinstance(error, torch.OutOfMemoryError)
                found = {"failed": "out of memory" if short else f"{type(error).__name__}: {error}"[:300]}
            add_row(rows, cell | found | {"took_s": round(time.perf_counter() - started, 1)})


def add_row(rows: Path, row: Cell) -> None:
    """Append a line, and see it on the disk: what a killed process held is lost."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def measured(cell: Cell, backbone: Path, device: torch.device, size: str) -> Cell:
    """Utterances a second, memory, and operations of an utterance where they can be counted."""
    experiment = described(cell, backbone)
    if cell.get("way") == "trainer":
        return theirs(experiment, speech(TRAINERS_UTTERANCES[size]), device, cell["family"] != "whisper")
    even = EVEN_SECONDS if cell.get("switch", "").startswith("equal lengths") else None
    masked = cell.get("switch") == "equal lengths, with a mask"
    return ours(experiment, speech(UTTERANCES[size], even), device, masked)


def described(cell: Cell, backbone: Path) -> Experiment:
    """The shipped defaults but for the size of a batch: an epoch that is not timed, and one or several that are."""
    epochs = 1 + max(1, cell["seconds"] // 60)
    sections: dict[str, Any] = {"compile": True} if cell.get("switch") == "compile" else {}
    return Experiment.model_validate(
        {
            "name": "gpu",
            "corpora": {"synthetic": None},
            "emotions": EMOTIONS,
            "backbone": str(backbone),
            "adapter": {"method": cell["method"]},
            "batch_seconds": cell["seconds"],
            "epochs": epochs,
            "patience": epochs,
        }
        | sections
    )


def ours(
    experiment: Experiment, utterances: list[trainer.Utterance], device: torch.device, masked: bool = False
) -> Cell:
    """`loop.fit`; an epoch is timed from the call for its batches to the call for dev's, which is one utterance.

    ``masked``: batches of equal lengths say that they are padded.
    """
    table, counter = as_table(utterances), trainer.operations()
    starts: list[float] = []
    seconds: list[float] = []
    steps: list[int] = []
    records: list[loop.Record] = []
    own = feed.data(experiment, stream.Held(table), stream.Held(table.slice(0, 1)), stream.SPEECH, threads=4)
    with ExitStack() as counting:

        def train(epoch: int) -> Iterable[stream.Batch]:
            if epoch == 1 and not experiment.compile:  # compiled blocks are not compiled while operations are counted
                counting.enter_context(counter)
            steps.append(len(own.counts(epoch)))
            starts.append(trainer.now(device))
            return (replace(batch, padded=True) if masked else batch for batch in own.train(epoch))

        def dev() -> Iterable[stream.Batch]:
            seconds.append(trainer.now(device) - starts[-1])
            counting.close()
            return own.dev()

        data = replace(own, train=train, dev=dev)
        loop.fit(build(experiment, device), data, lambda record, save: records.append(record))
    assert all(np.isfinite(record["train_loss"]) for record in records)
    return {
        "utterances_per_s": (len(seconds) - 1) * len(utterances) / sum(seconds[1:]),
        "step_ms": 1000 * sum(seconds[1:]) / sum(steps[1:]),
        "memory_gib": records[-1]["peak_memory_mb"] / 1024,
        "flops_per_utterance": None if experiment.compile else counter.get_total_flops() / len(utterances),
    }


def theirs(experiment: Experiment, utterances: list[trainer.Utterance], device: torch.device, grouped: bool) -> Cell:
    """transformers' Trainer with PEFT; on a GPU with four processes that put batches together."""
    batch_size = max(1, round(experiment.batch_seconds / EVEN_SECONDS))
    batch_size = min(batch_size, len(utterances) // 2)
    outcome = trainer.run(
        experiment,
        utterances,
        utterances[:1],
        batch_size=batch_size,
        group_by_length=grouped,
        max_steps=2 * -(-len(utterances) // batch_size),
        warm_up=2,
        count_flops=True,
        workers=4 if device.type == "cuda" else 0,
        device=device,
    )
    assert np.isfinite(outcome.train_loss)
    return {
        "utterances_per_s": outcome.utterances_per_s,
        "step_ms": 1000 * batch_size / outcome.utterances_per_s,
        "memory_gib": outcome.peak_memory_mb / 1024,
        "flops_per_utterance": outcome.flops_per_utterance,
    }


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


def write_backbone(
    family: str, shape: tuple[int, int, int, int], directory: Path, device: torch.device | str = "cpu"
) -> Path:
    """Random weights of one family in transformers' layout, in bf16, which halves what is written and held."""
    blocks, width, heads, front = shape
    if family == "whisper":
        config = transformers.WhisperConfig(
            d_model=width,
            encoder_layers=blocks,
            encoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            num_mel_bins=front,
        )
        kind, extractor = WhisperEncoder, transformers.WhisperFeatureExtractor(feature_size=front)
    else:
        of_family = {
            "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
            "hubert": (transformers.HubertConfig, transformers.HubertModel),
            "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
        }
        described, kind = of_family[family]
        config = described(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            conv_dim=[front] * 7,
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    with torch.device(device):
        model = kind(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    extractor.save_pretrained(directory)
    return directory


def speech(count: int, seconds: float | None = None) -> list[trainer.Utterance]:
    """Noise with an envelope, of ``seconds``; None: 1 to 6 s."""
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(count):
        samples = int((seconds or rng.uniform(1, 6)) * SAMPLING_RATE)
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


if __name__ == "__main__":
    own_device = torch.device(sys.argv[3] if len(sys.argv) > 3 else "cuda")
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), own_device, sys.argv[4] if len(sys.argv) > 4 else "large")
