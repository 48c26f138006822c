"""What the embedded backbones have learned, on real speech: a linear probe on each, frozen, beside random weights.

    python tests/benchmarks/embedded.py RAVDESS [NAME ...] > results/benchmarks/embedded.md

RAVDESS: a directory of its speech. NAME: backbones, by default the two embedded ones; ``--dev`` shows dev alone, to
choose between trainings. Eight emotions, EmoBox's six folds; a fold's dev speakers are the next one's test.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ser_ray.config import Audio
from ser_ray.corpora import ravdess
from ser_ray.evaluation.intervals import bootstrap_ci95, paired_gap
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models import backbones
from ser_ray.models.backbones import Backbone
from ser_ray.models.logmel import LogMel
from ser_ray.models.pooling.statistics import masked_statistics
from ser_ray.protocols.folds import EMOBOX_RAVDESS
from ser_ray.speech.audio import load_waveform

EMBEDDED = ("embedded/tiny-whisper", "embedded/tiny-wav2vec2")
C_GRID = (0.001, 0.01, 0.1)
"""Inverse regularisation: chosen with the layer, by the mean UAR on dev."""
EMOTIONS = sorted(ravdess.EMOTIONS.values())
FOLDS = len(EMOBOX_RAVDESS)


@dataclass(frozen=True)
class Speech:
    """N utterances of real speech."""

    waveforms: list[np.ndarray]
    labels: np.ndarray
    speakers: list[str]
    folds: np.ndarray
    """The one that tests on it."""


@dataclass(frozen=True)
class Probe:
    """Of one kind of features: what dev chose, and what it says of test, every utterance by the fold that tests it."""

    layer: int
    strength: float
    dev: float
    predicted: np.ndarray


def read(directory: Path) -> Speech:
    """RAVDESS's speech, at 16 kHz."""
    paths = sorted(path for path in directory.rglob("03-01-*") if path.suffix in (".wav", ".flac"))
    utterances = [ravdess.parse(path) for path in paths]
    fold_of = {f"ravdess/{actor}": fold for fold, actors in enumerate(EMOBOX_RAVDESS) for actor in actors}
    return Speech(
        [load_waveform(path, Audio()) for path in paths],
        np.array([EMOTIONS.index(utterance.emotion) for utterance in utterances]),
        [utterance.speaker for utterance in utterances],
        np.array([fold_of[utterance.speaker] for utterance in utterances]),
    )


@torch.inference_mode()
def features(
    speech: Speech, layers_of: Callable[[torch.Tensor, torch.Tensor], tuple[list[torch.Tensor], torch.Tensor]]
):
    """(N, L, P): mean and standard deviation over real frames of every state; utterances of like length together."""
    order = np.argsort([len(waveform) for waveform in speech.waveforms])
    found: dict[int, np.ndarray] = {}
    for some in np.array_split(order, len(order) // 16):
        waves = [torch.from_numpy(speech.waveforms[place]) for place in some]
        lengths_B = torch.tensor([len(wave) for wave in waves])
        states, mask_BF = layers_of(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths_B)
        pooled_BLP = torch.stack([masked_statistics(state, mask_BF) for state in states], dim=1)
        found |= dict(zip(some.tolist(), pooled_BLP.numpy(), strict=True))
    return np.stack([found[place] for place in range(len(order))])


def of_backbone(backbone: Backbone) -> Callable[..., tuple[list[torch.Tensor], torch.Tensor]]:
    """Its states, in evaluation mode."""
    backbone.eval()
    return lambda waveform_BT, lengths_B: backbone(waveform_BT, lengths_B)


def of_logmel(waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The log-mel spectrum as the only state."""
    features_BMF, frames_B = LogMel(80)(waveform_BT, lengths_B)
    return [features_BMF.transpose(1, 2)], backbones.frame_mask(frames_B, features_BMF.shape[-1])


def probe(speech: Speech, features_NLP: np.ndarray, test: bool) -> Probe:
    """Logistic regression by fold; without ``test`` nothing is predicted there."""
    grid = [(layer, strength) for layer in range(features_NLP.shape[1]) for strength in C_GRID]
    scores = {
        point: float(np.mean([_fold(speech, features_NLP, *point, f)[0] for f in range(FOLDS)])) for point in grid
    }
    best = max(grid, key=lambda point: scores[point])
    predicted = np.full(len(speech.labels), -1)
    for fold in range(FOLDS) if test else ():
        predicted[speech.folds == fold] = _fold(speech, features_NLP, *best, fold)[1]
    return Probe(*best, scores[best], predicted)


def _fold(speech: Speech, features_NLP: np.ndarray, layer: int, strength: float, fold: int) -> tuple[float, np.ndarray]:
    """UAR on dev, and what is said of test."""
    dev = speech.folds == (fold + 1) % FOLDS
    test = speech.folds == fold
    train = ~(dev | test)
    scaler = StandardScaler().fit(features_NLP[train, layer])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest one may need more; dev says if it matters
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=300)
        model.fit(scaler.transform(features_NLP[train, layer]), speech.labels[train])
    guess = model.predict(scaler.transform(features_NLP[dev, layer]))
    score = float(uar(confusion(speech.labels[dev], guess, len(EMOTIONS))))
    return score, model.predict(scaler.transform(features_NLP[test, layer]))


def row(speech: Speech, name: str, own: Probe) -> str:
    """One line of the table."""
    one = [uar(confusion(speech.labels[speech.folds == f], own.predicted[speech.folds == f], 8)) for f in range(FOLDS)]
    limits, _ = bootstrap_ci95(speech.labels, own.predicted, speech.speakers, len(EMOTIONS))
    low, high = limits["uar"]
    whole = uar(confusion(speech.labels, own.predicted, len(EMOTIONS)))
    return f"| {name} | {own.layer} | {own.dev:.3f} | {whole:.3f} [{low:.3f}, {high:.3f}] | {np.mean(one):.3f} |"


def gap(speech: Speech, one: Probe, other: Probe) -> str:
    """Points of UAR, paired over speakers."""
    found = paired_gap(speech.labels, one.predicted, other.predicted, speech.speakers, len(EMOTIONS))["uar"]
    return f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ravdess", type=Path)
    parser.add_argument("names", nargs="*", default=EMBEDDED)
    parser.add_argument("--seeds", type=int, default=3, help="random ones beside each")
    parser.add_argument("--dev", action="store_true", help="dev alone: nothing is predicted on test")
    given = parser.parse_args()
    speech = read(given.ravdess)
    probes: dict[str, Probe] = {}

    def note(name: str, layers_of: Callable[..., tuple[list[torch.Tensor], torch.Tensor]]) -> None:
        probes[name] = own = probe(speech, features(speech, layers_of), test=not given.dev)
        print(f"{name}: dev {own.dev:.3f}, layer {own.layer}, C {own.strength}", file=sys.stderr, flush=True)

    note("log-mel statistics", of_logmel)
    for name in given.names:
        note(name, of_backbone(backbones.load(name)))
        for seed in range(given.seeds):
            note(f"{name}, random weights, seed {seed}", of_backbone(backbones.untrained(name, seed)))
    if not given.dev:
        print(_page(speech, probes, given.names, given.seeds))


def _page(speech: Speech, probes: dict[str, Probe], names: list[str], seeds: int) -> str:
    table = [row(speech, name, own) for name, own in probes.items()]
    gaps = []
    for name in names:
        # Of the random ones the best: the smallest gap.
        best = max((f"{name}, random weights, seed {seed}" for seed in range(seeds)), key=lambda one: probes[one].dev)
        against = [gap(speech, probes[name], probes[other]) for other in (best, "log-mel statistics")]
        gaps.append(f"| {name} | {against[0]} | {against[1]} |")
    return "\n".join(
        [
            "# Embedded backbones on real speech",
            "",
            "```",
            "python tests/benchmarks/embedded.py RAVDESS > results/benchmarks/embedded.md",
            "```",
            "",
            "RAVDESS, eight emotions, EmoBox's six speaker-disjoint folds. Frozen; mean and standard deviation over",
            "frames of one layer, at true length; logistic regression. Layer and regularisation are chosen by",
            "mean UAR on dev (the next fold's speakers, not trained on); test is predicted once. 95 % intervals from a",
            "bootstrap over the 24 speakers, of the six folds' predictions together.",
            "",
            "| | layer | dev UAR | test UAR | mean of folds |",
            "|---|---|---|---|---|",
            *table,
            "",
            "Points of UAR on test, paired over speakers; of the random ones against the one that is best on dev:",
            "",
            "| | over random weights | over log-mel statistics |",
            "|---|---|---|",
            *gaps,
        ]
    )


if __name__ == "__main__":
    main()
