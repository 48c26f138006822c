"""Frozen, LoRA, QLoRA and full training of an embedded backbone on the demo's corpus, at equal epochs.

    python tests/benchmarks/adapters.py [BACKBONE] > results/benchmarks/adapters.md
    python tests/benchmarks/adapters.py --seeds 3 --ways QLoRA "full, random weights" > .../adapters_seeds.md

Everything else is as in search_spaces/demo.yaml, but nothing is known of speakers. Each way takes the learning rate
with the best dev UAR on fold 0; then every fold is trained with every seed, and test is predicted with the epoch that
is best on dev. One process of one thread a training, as many at once as there are cores: 20 minutes on two for either
command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from embedded import of_logmel  # beside this file
from rich.console import Console

from ser_ray import config, prepare
from ser_ray.disk import write_json
from ser_ray.evaluation.baselines import linear_svm
from ser_ray.evaluation.intervals import bootstrap_ci95, paired_gap
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models import backbones, checkpoint, pretrained
from ser_ray.models.classifier import build
from ser_ray.models.pooling.statistics import masked_statistics
from ser_ray.protocols.task import load_task
from ser_ray.runtime import feed
from ser_ray.speech import stream
from ser_ray.training import loop

SPACE: Final = Path(__file__).resolve().parents[2] / "search_spaces" / "demo.yaml"
WAYS: Final = {  # name: (adapter.method, learned weights to start from, rates)
    "frozen": ("frozen", True, (1e-3,)),
    "LoRA": ("lora", True, (1e-3, 3e-3)),
    "QLoRA": ("qlora", True, (1e-3, 3e-3)),
    "full": ("full", True, (2e-4, 8e-4)),
    "full, random weights": ("full", False, (3e-4, 1e-3, 2e-3)),
}
LOGMEL: Final = "log-mel statistics, linear SVM"
HEAD_RATE: Final = 1e-3
EPOCHS: Final = 8
FOLDS: Final = 4


def fit(backbone: str, method: str, rate: float, fold: int, seed: int, out: str) -> None:
    """Train once; what came of it goes to ``out`` as JSON."""
    overrides = [
        f"experiment.backbone={backbone}", f"experiment.adapter.method={method}", f"experiment.optimizer.lr={rate}",
        f"experiment.protocol.fold={fold}", f"experiment.epochs={EPOCHS}", f"experiment.patience={EPOCHS}",
        f"experiment.seed={seed}", "experiment.head.speaker=none", f"experiment.optimizer.head_lr={HEAD_RATE}",
    ]  # fmt: skip
    space = config.load(SPACE, overrides)
    torch.set_num_threads(1)
    torch.manual_seed(FOLDS * seed + fold)
    task = load_task(space.experiment, prepare.prepare(space, use_ray=False, console=Console(quiet=True)))
    held = {split: stream.Files(task.rows(split)).hold() for split in ("train", "dev", "test")}
    model = build(space.experiment)
    data = feed.data(space.experiment, held["train"], held["dev"], stream.SPEECH)
    records: list[loop.Record] = []
    best = Path(out).with_suffix(".best")

    def keep(record: loop.Record, save: loop.Save) -> None:
        records.append(record)
        if record["best_epoch"] == record["epoch"]:
            save(best)

    loop.forget_peak()
    loop.fit(model, data, keep)
    guesses: dict[str, int] = {}
    chosen = checkpoint.load(best)
    test = stream.short_to_long(held["test"].rows, space.experiment.batch_seconds)
    for batch, logits_BK in loop.predict_batches(chosen, test):
        guesses |= dict(zip(batch.utterance_ids, logits_BK.argmax(-1).tolist(), strict=True))
    adapted = [path for name in ("adapter", "backbone") for path in (best / name).glob("*.safetensors")]
    told = {
        "dev": records[-1]["best_dev_uar"],
        "seconds": statistics.median(record["seconds"] for record in records),
        "memory": max(record["peak_memory_mb"] for record in records),
        "parameters": records[-1]["trainable_parameters"],
        "size": sum(path.stat().st_size for path in [*adapted, best / "head.safetensors"]),
    }
    write_json(Path(out), told | _told(guesses, task.labels("test"), len(space.experiment.emotions)))


def logmel(fold: int) -> dict[str, Any]:
    """No backbone: a linear SVM on mean and deviation of the log-mel spectrum."""
    space = config.load(SPACE, [f"experiment.protocol.fold={fold}"])
    task = load_task(space.experiment, prepare.prepare(space, use_ray=False, console=Console(quiet=True)))
    found: dict[str, np.ndarray] = {}
    every = [stream.short_to_long(stream.Files(task.rows(s)).hold().rows, 40) for s in ("train", "test")]
    for batch in itertools.chain(*every):
        (spectrum_BFM,), mask_BF = of_logmel(batch.inputs, batch.lengths_B)
        found |= dict(zip(batch.utterance_ids, masked_statistics(spectrum_BFM, mask_BF).numpy(), strict=True))
    train, test = task.labels("train"), task.labels("test")
    probabilities_MK = linear_svm(
        np.stack([found[i] for i in train]), np.array(list(train.values())), [_speaker(i) for i in train],
        np.stack([found[i] for i in test]), len(space.experiment.emotions),
    )  # fmt: skip
    guesses = dict(zip(test, probabilities_MK.argmax(-1).tolist(), strict=True))
    return _told(guesses, test, len(space.experiment.emotions))


def _told(guesses: dict[str, int], labels: dict[str, int], emotions: int) -> dict[str, Any]:
    """What is said of test."""
    ids = sorted(guesses)
    return {
        "labels": [labels[i] for i in ids], "predicted": [guesses[i] for i in ids],
        "speakers": [_speaker(i) for i in ids], "emotions": emotions,
    }  # fmt: skip


def _speaker(utterance_id: str) -> str:
    return utterance_id.split("/")[1].split("-")[0]


def apart(*arguments: Any) -> dict[str, Any]:
    """`fit` in a process of its own, so that its memory is its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/told.json"
        process = multiprocessing.get_context("spawn").Process(target=fit, args=(*arguments, out))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{arguments}: failed")
        return json.loads(Path(out).read_text())


def trained(names: list[str], backbone: str, random: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Of every way all seeds and folds, at the rate that is best on the first one's dev; ``random``: one a seed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(name: str, rate: float, fold: int, seed: int) -> Future[dict[str, Any]]:
            method, learned, _ = WAYS[name]
            return pool.submit(apart, backbone if learned else random[seed], method, rate, fold, seed)

        tries = {name: {rate: start(name, rate, 0, 0) for rate in WAYS[name][2]} for name in names}
        best = {}
        for name, tried in tries.items():
            devs = {rate: future.result()["dev"] for rate, future in tried.items()}
            best[name] = max(devs, key=lambda rate: devs[rate])
            print(name, " ".join(f"{r:g}: {dev:.3f}" for r, dev in devs.items()), file=sys.stderr, flush=True)
        runs = [(seed, fold) for seed in range(len(random)) for fold in range(FOLDS)]
        rest = {name: [start(name, rate, fold, seed) for seed, fold in runs[1:]] for name, rate in best.items()}
        return {
            name: [{**one.result(), "rate": rate} for one in [tries[name][rate], *rest[name]]]
            for name, rate in best.items()
        }


def joined(runs: list[dict[str, Any]], key: str) -> list[Any]:
    """What the runs say of test, one after the other."""
    return [value for one in runs for value in one[key]]


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    labels, predicted, speakers = (np.array(joined(runs, key)) for key in ("labels", "predicted", "speakers"))
    low, high = bootstrap_ci95(labels, predicted, speakers.tolist(), runs[0]["emotions"])[0]["uar"]
    value = uar(confusion(labels, predicted, runs[0]["emotions"]))
    if "rate" not in runs[0]:
        return f"| {name} | | | {value:.3f} [{low:.3f}, {high:.3f}] | | | | |"
    dev, seconds = (statistics.mean(one[key] for one in runs) for key in ("dev", "seconds"))
    memory = max(one["memory"] for one in runs)
    return (
        f"| {name} | {runs[0]['rate']:g} | {dev:.3f} | {value:.3f} [{low:.3f}, {high:.3f}] | {seconds:.1f} "
        f"| {memory:.0f} | {runs[0]['parameters']:,} | {runs[0]['size'] / 1e6:.2f} |"
    )


def gap(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Points of UAR on the same test utterances."""
    labels, speakers = np.array(joined(one, "labels")), joined(one, "speakers")
    assert joined(other, "speakers") == speakers
    predicted = (np.array(joined(runs, "predicted")) for runs in (one, other))
    found = paired_gap(labels, *predicted, speakers, one[0]["emotions"])["uar"]
    return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", nargs="?", default="embedded/tiny-whisper")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    backbone, seeds = given.backbone, range(given.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        random = [f"{scratch}/{seed}" for seed in seeds]
        for seed, directory in enumerate(random):
            backbones.untrained(backbone, seed).model.save_pretrained(directory)
            pretrained.describe(backbone)[1].save_pretrained(directory)
        prepare.prepare(config.load(SPACE, []), use_ray=False, console=Console(stderr=True))
        # A linear SVM has no seed: its folds stand beside those of every other's.
        found = {LOGMEL: [logmel(fold) for fold in range(FOLDS)] * len(seeds)}
        found |= trained(given.ways, backbone, random)
    gaps = {
        f"{one} over {other}": gap(found[one], found[other])
        for one, other in (
            ("QLoRA", "LoRA"), ("LoRA", "frozen"), ("LoRA", "full"), ("LoRA", "full, random weights"),
            ("QLoRA", "full, random weights"), ("QLoRA", LOGMEL),
        )
        if one in found and other in found
    }  # fmt: skip
    print(_page(backbone, len(seeds), found, gaps))


def _page(backbone: str, seeds: int, found: dict[str, list[dict[str, Any]]], gaps: dict[str, str]) -> str:
    command = shlex.join(["python", "tests/benchmarks/adapters.py", *sys.argv[1:]])
    page = "adapters" if seeds == 1 else "adapters_seeds"
    return "\n".join(
        [
            "# Ways to adapt an embedded backbone, at equal epochs",
            "",
            "```",
            f"{command} > results/benchmarks/{page}.md",
            "```",
            "",
            f"{backbone} on the demo's synthetic corpus, as search_spaces/demo.yaml says otherwise, but nothing",
            f"is known of speakers, and the rate of the head is {HEAD_RATE:g}; {EPOCHS} epochs; of two or three",
            "learning rates the best on fold 0's dev (frozen: the head alone learns); all four",
            f"folds, {seeds} seed{'s (of random weights too)' if seeds > 1 else ''}, test together, 24 speakers,",
            "intervals over them. One thread a training, one training a core; seconds and memory of the whole process.",
            "",
            "| | rate | dev UAR | test UAR | s an epoch | peak MB | trainable | MB stored |",
            "|---|---|---|---|---|---|---|---|",
            *(row(name, folds) for name, folds in found.items()),
            "",
            "Points of UAR on test, paired over speakers:",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {line} |" for name, line in gaps.items()),
        ]
    )


if __name__ == "__main__":
    main()
