"""The order of an epoch over three corpora, and what an utterance weighs in it, before and now.

    python tests/benchmarks/order.py > results/benchmarks/order.md

CREMA-D, RAVDESS and TESS in their published sizes, without sound, in shards of 64 as prepare makes them; all of it is
train. Lengths are drawn: normal about a mean of each corpus, disgust a quarter longer than angry. Batches are of 120 s,
as in search_spaces/reference.yaml, one a step.

Before 2026-11-27, windows of 2048 utterances were filled in the order of the files, batches were shuffled within a
window, and a step's loss was the weighted mean over its own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from ser_ray.config import Experiment
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import order
from ser_ray.training.loop import class_weights

BATCH_SECONDS: Final = 120.0
SHARD: Final = 64
OLD_WINDOW: Final = 2048
EMOTIONS: Final = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprised")
CORPORA: Final = {
    "CREMA-D": ((1271, 1271, 1271, 1271, 1087, 1271, 0), 2.5, 0.5),
    "RAVDESS": ((192, 192, 192, 192, 288, 192, 192), 3.7, 0.3),
    "TESS": ((400,) * 7, 2.1, 0.3),
}
"""Utterances of every emotion (RAVDESS's calm is neutral), and the mean and deviation of their seconds."""
LONGER: Final = (0.9, 1.12, 0.98, 0.98, 0.96, 1.04, 1.0)
"""Emotions beside the corpus's mean."""

Batches = Sequence[np.ndarray]


def rows(share: float = 1.0) -> pa.Table:
    """The utterances, or a share of each corpus, as a fold has them."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[object]] = {name: [] for name in ("corpus", "shard", "row", "label", "num_samples")}
    for corpus, (counts, mean, deviation) in CORPORA.items():
        label_N = rng.permutation(np.repeat(np.arange(len(EMOTIONS)), [round(share * count) for count in counts]))
        seconds_N = np.clip(rng.normal(mean, deviation, len(label_N)), 1, 6) * np.array(LONGER)[label_N]
        columns["corpus"] += [corpus] * len(label_N)
        columns["shard"] += [f"{corpus}/{n // SHARD}" for n in range(len(label_N))]
        columns["row"] += [n % SHARD for n in range(len(label_N))]
        columns["label"] += label_N.tolist()
        columns["num_samples"] += (seconds_N * SAMPLING_RATE).astype(int).tolist()
    shard = pa.array(columns.pop("shard")).dictionary_encode()
    return pa.table(columns).append_column("shard", shard)


def before(table: pa.Table, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch as they were until 2026-11-27."""
    rng, samples_N = np.random.default_rng(epoch), table["num_samples"].to_numpy()
    batches = []
    for first in range(0, table.num_rows, OLD_WINDOW):
        own = np.arange(first, min(first + OLD_WINDOW, table.num_rows))
        packed = order.by_length(samples_N[own], BATCH_SECONDS, rng)
        batches += [own[packed[number]] for number in rng.permutation(len(packed))]
    return batches


def now(table: pa.Table, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch."""
    return [batch for window in order.epoch(table, BATCH_SECONDS, (0, epoch)) for batch in window]


def tenths(table: pa.Table, batches: Batches) -> np.ndarray:
    """(10, C): the share of each corpus in each tenth of an epoch's utterances."""
    corpus_N = np.array(table["corpus"].to_pylist())[np.concatenate(list(batches))]
    return np.array([[np.mean(part == corpus) for corpus in CORPORA] for part in np.array_split(corpus_N, 10)])


def weights(table: pa.Table) -> np.ndarray:
    """(N,): what the class of every utterance weighs."""
    label_N = table["label"].to_numpy()
    experiment = Experiment(name="order", corpora={"synthetic": None}, backbone="none", emotions=EMOTIONS)
    counts = np.bincount(label_N, minlength=len(EMOTIONS))
    return np.asarray(class_weights(experiment, tuple(counts.tolist())).double().numpy()[label_N])


def shares(table: pa.Table, batches: Batches, by_batch: bool) -> np.ndarray:
    """(N,): what every utterance weighs in the sum of an epoch's losses; ``by_batch``: in means over batches."""
    weight_N, found_N = weights(table), np.empty(table.num_rows)
    for batch in batches:
        held = weight_N[batch].sum() if by_batch else weight_N.sum() / len(batches)
        found_N[batch] = weight_N[batch] / held
    return found_N / found_N.sum()


def page(table: pa.Table) -> str:
    """Both tables, as Markdown."""
    about = (__doc__ or "").split("\n\n")
    parts = [
        f"# {about[0].strip().rstrip('.')}",
        f"```\n{about[1].strip()}\n```",
        *(part.strip() for part in about[2:]),
    ]
    corpus_N = table["corpus"].to_pylist()
    whole = [corpus_N.count(corpus) / len(corpus_N) for corpus in CORPORA]
    heads = [f"{way}, epoch {epoch}" for way in ("before", "now") for epoch in (1, 2)]
    found = [tenths(table, way(table, epoch)) for way in (before, now) for epoch in (1, 2)]
    parts.append(f"Share of {', '.join(CORPORA)} in every tenth of an epoch, in per cent:")
    lines = [f"| tenth | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for number in range(10):
        lines.append(f"| {number + 1} | {' | '.join(_per_cent(part[number]) for part in found)} |")
    lines.append(f"| all | {' | '.join([_per_cent(whole)] * len(heads))} |")
    largest = [f"{100 * np.abs(part - whole).max():.1f}" for part in found]
    lines.append(f"| largest difference, points | {' | '.join(largest)} |")
    parts += ["\n".join(lines), _losses(table)]
    return "\n\n".join(parts)


def _losses(table: pa.Table) -> str:
    label_N, samples_N = table["label"].to_numpy(), table["num_samples"].to_numpy()
    by_way = [shares(table, before(table, 1), True), shares(table, now(table, 1), False)]
    lines = [
        "Share of the loss of an epoch, in per cent, with balanced class weights, which are to give every emotion",
        f"{100 / len(EMOTIONS):.1f}:",
        "",
        "| | before | now |",
        "|---|---|---|",
    ]
    for label, emotion in enumerate(EMOTIONS):
        lines.append(f"| {emotion} | {' | '.join(f'{100 * way[label_N == label].sum():.1f}' for way in by_way)} |")
    # Apart from the class weight, which is the same before and now.
    own = [way / weights(table) for way in by_way]
    short, long = (samples_N <= np.quantile(samples_N, 0.1), samples_N >= np.quantile(samples_N, 0.9))
    ratios = [f"{way[long].mean() / way[short].mean():.2f}" for way in own]
    lines.append(f"| an utterance of the longest tenth, times one of the shortest | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _per_cent(shares_C: Sequence[float] | np.ndarray) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in shares_C)


if __name__ == "__main__":
    print(page(rows()))
