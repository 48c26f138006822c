"""What LoRA's dropout does to UAR: none, PEFT's on every frame, and that of `ser_ray.models.lowrank`, on whole inputs.

    python tests/benchmarks/dropout.py [--dropout 0.05 0.2] [--folds 4] > results/benchmarks/dropout.md

embedded/tiny-whisper on the demo's corpus, the upper half adapted over cached features; every fold is trained for a
fixed number of epochs, and test is predicted with the last one, so that nothing is chosen. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np
import speed
import torch

from ser_ray import config, prepare
from ser_ray.config import Experiment
from ser_ray.evaluation.intervals import bootstrap_ci95, paired_gap
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.protocols.task import load_task

SPACE: Final = Path(__file__).resolve().parents[2] / "search_spaces" / "demo.yaml"
NONE, FRAMES, INPUTS = "none", "every frame anew (PEFT)", "inputs of a layer, for a whole batch (lowrank.py)"
EPOCHS: Final = 8
EMOTIONS: Final = 7


def of_peft(experiment: Experiment) -> EmotionClassifier:
    """A model that trains through PEFT's own layers."""
    model = build(experiment)
    model.backbone.updates = None
    return model


def train(way: str, dropout: float, fold: int, scratch: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, predictions and speakers of the fold's test set."""
    overrides = [
        "experiment.backbone=embedded/tiny-whisper", f"experiment.protocol.fold={fold}", f"experiment.epochs={EPOCHS}",
        f"experiment.patience={EPOCHS}", "experiment.optimizer.lr=1e-3", "experiment.optimizer.head_lr=1e-3",
        "experiment.head.speaker=none",
        f"experiment.adapter={{method: lora, first_layer: 2, dropout: {0.0 if way == NONE else dropout}}}",
    ]  # fmt: skip
    space = config.load(SPACE, overrides)
    task = load_task(space.experiment, prepare.prepare(space, use_ray=False, console=speed.QUIET))
    rows = {split: speed._rows(task, split, None) for split in ("train", "test")}
    torch.manual_seed(fold)
    with mock.patch.object(speed, "build", of_peft if way == FRAMES else build):
        fitted = speed._fit_cached(space.experiment, rows["train"], rows["test"], scratch)
    labels = rows["test"]["label"].to_numpy()
    speakers = [speaker_of(i) for i in rows["test"]["utterance_id"].to_pylist()]
    speed._say(way, dropout, fold, float(uar(confusion(labels, fitted.predicted, EMOTIONS))))
    return labels, fitted.predicted, speakers


def speaker_of(utterance_id: str) -> str:
    """The speaker of an utterance of the demo's corpus."""
    return utterance_id.split("/")[1].split("-")[0]


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--folds", type=int, default=4)
    arguments = parser.parse_args()
    ways = [(NONE, 0.0), *((way, share) for share in arguments.dropout for way in (FRAMES, INPUTS))]
    found: dict[tuple[str, float], tuple[np.ndarray, np.ndarray, list[str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for way in ways:
            parts = [train(*way, fold, Path(scratch)) for fold in range(arguments.folds)]
            labels, guesses = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
            found[way] = labels, guesses, [speaker for part in parts for speaker in part[2]]
    print(page(found, arguments.folds))


def page(found: dict[tuple[str, float], tuple[np.ndarray, np.ndarray, list[str]]], folds: int) -> str:
    """One row a way, with the difference from none, paired over speakers."""
    labels, plain, speakers = found[NONE, 0.0]
    lines = ["# What LoRA's dropout does to UAR", "", "```", "python tests/benchmarks/dropout.py", "```", ""]
    lines += [
        f"embedded/tiny-whisper, upper half adapted, {EPOCHS} epochs, {folds} folds of the demo's corpus, test in one",
        f"({len(set(speakers))} speakers, intervals over them). The script says the rest.",
        "",
        "| dropout | share | test UAR | points over none |",
        "|---|---|---|---|",
    ]
    for (way, share), (_, guesses, _) in found.items():
        low, high = bootstrap_ci95(labels, guesses, speakers, EMOTIONS)[0]["uar"]
        value = float(uar(confusion(labels, guesses, EMOTIONS)))
        gap = paired_gap(labels, guesses, plain, speakers, EMOTIONS)["uar"]
        over = "" if way == NONE else f"{100 * gap.difference:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        lines.append(f"| {way} | {share or ''} | {value:.3f} [{low:.3f}, {high:.3f}] | {over} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
