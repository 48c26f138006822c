"""Variants of LoRA at equal epochs on real speech: whisper-base on RAVDESS, as EmoBox tests it.

    python tests/benchmarks/variants.py RAVDESS BACKBONE SCRATCH > results/benchmarks/variants.md

The last block is adapted, on cached features of what is below it. The head sees its output alone, and starts as the
linear probe of that: with all layers, as search_spaces/ravdess_emobox.yaml has it, the probe leaves a training loss of
0.04, and no variant has anything to learn. The other settings are of that file, and what its search chose.

Every way takes that of the same rates whose last epoch has the best dev UAR on fold 0, and is trained on all folds with
every seed; test is predicted with the last epoch, so that the probe that all start from is not chosen in its place.
One process of one thread a training. A run that is done is not made again: what it found is in SCRATCH. With --page
nothing is trained, and the page says what is missing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from ser_ray import config, prepare
from ser_ray.config import SearchSpace
from ser_ray.disk import read_json, replacing, write_json
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models import prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import feature_cache, feed
from ser_ray.speech import cached_features, shards, stream
from ser_ray.training import loop

SPACE: Final = Path(__file__).resolve().parents[2] / "search_spaces" / "ravdess_emobox.yaml"
WAYS: Final = {  # name: (adapter.method, adapter.variant, the way that it is compared with)
    "LoRA": ("lora", "plain", ""),
    "rsLoRA": ("lora", "rslora", "LoRA"),
    "DoRA": ("lora", "dora", "LoRA"),
    "PiSSA": ("lora", "pissa", "LoRA"),
    "LoRA+": ("lora", "loraplus", "LoRA"),
    "QLoRA": ("qlora", "plain", "LoRA"),
    "LoftQ": ("qlora", "loftq", "QLoRA"),
}
PROBE: Final = "the probe, not trained further"
RATES: Final = (1e-4, 5e-4)
EPOCHS: Final = 2
FIRST_LAYER: Final = 5
FOLDS: Final = 6
EMOTIONS: Final = 8
PAGE: Final = """\
# Variants of LoRA on emotions, at equal epochs

```
python tests/benchmarks/variants.py RAVDESS BACKBONE SCRATCH > results/benchmarks/variants.md
```

The encoder of openai/whisper-base. RAVDESS, eight emotions, EmoBox's six speaker-disjoint folds. {epochs} epochs of the
last block (number {block} of 0 to 5; rank 4, alpha 16, dropout 0.1) over cached features of the others; the head sees
its output alone, and starts as the linear probe of that (tests/benchmarks/variants.py says why). bf16. Of each way's
rates the best on fold 0's dev. The last epoch of every fold and seed, test together, 24 speakers, intervals over them.
Seconds: CPU time of an epoch, one thread.
{missing}
| | rate | seeds | train loss | dev UAR | test UAR | of each seed | trainable | s an epoch |
|---|---|---|---|---|---|---|---|---|
{figures}

Points of UAR on test, paired over speakers, and p-values, also corrected for their number (Holm):

| | seeds | | p | corrected |
|---|---|---|---|---|
{gaps}

Dev UAR of fold 0 after the last epoch, seed 0, at each rate:

| | {rates} |
|---{lines}|
{tries}
"""


class Run(NamedTuple):
    """One training."""

    way: str
    rate: float
    fold: int
    seed: int

    def file(self, scratch: Path) -> Path:
        return scratch / "runs" / f"{self.way}-{self.rate:g}-{self.fold}-{self.seed}.json"


def space(given: argparse.Namespace, run: Run) -> SearchSpace:
    """The search space of a run."""
    method, variant, _ = WAYS[run.way]
    overrides = [
        f"experiment.corpora={{ravdess: {given.ravdess}}}", f"experiment.backbone={given.backbone}",
        f"experiment.adapter.method={method}", f"experiment.adapter.variant={variant}", "experiment.adapter.rank=4",
        f"experiment.adapter.first_layer={FIRST_LAYER}", f"experiment.optimizer.lr={run.rate}",
        f"experiment.protocol.fold={run.fold}", f"experiment.seed={run.seed}", f"experiment.epochs={EPOCHS}",
        f"experiment.patience={EPOCHS}", "experiment.precision=bf16", f"storage.cache={given.scratch / 'cache'}",
        "experiment.head={layer_mix: last, pooling: statistics, dropout: 0.2}", "search={}", "tune.first=[]",
    ]  # fmt: skip
    return config.load(SPACE, overrides)


def features(given: argparse.Namespace, method: str, shard_dirs: list[Path]) -> tuple[cached_features.Prefix, Path]:
    """What is below the adapted block, of all recordings, and the directory where it is; made if it is not there."""
    way = next(name for name, (of_way, *_) in WAYS.items() if of_way == method)
    form = prefix.of(space(given, Run(way, RATES[0], 0, 0)).experiment, "fp32")
    extractor, directory = feature_cache.Extractor(1, 0), given.scratch / "features" / form.key()
    directory.mkdir(parents=True, exist_ok=True)
    for shard in [path for shard_dir in shard_dirs for path in shards.shard_paths(shard_dir)]:
        if not (directory / shard.name).is_file():
            extractor.extract(form, shard, directory / shard.name)
    return form, directory


@functools.lru_cache(maxsize=1)
def held(fold_file: Path, directory: Path) -> tuple[Task, dict[str, stream.Held]]:
    """The utterances of a fold in memory."""
    task = Task.read(fold_file)
    splits = ("train", "dev", "test")
    return task, {split: stream.Files(task.rows(split), cached_features.COLUMN, directory).hold() for split in splits}


def fit(work: tuple[argparse.Namespace, Run, cached_features.Prefix, Path]) -> Run:
    """Train once; what came of it goes to the run's file."""
    given, run, form, directory = work
    torch.set_num_threads(1)
    torch.manual_seed(FOLDS * run.seed + run.fold)
    experiment = space(given, run).experiment
    task, splits = held(given.scratch / "folds" / f"{run.fold}.parquet", directory)
    model = build(experiment)
    model.prefix = form
    data = feed.data(experiment, splits["train"], splits["dev"], stream.content_of(form))
    start(given, run, model, data, task, splits["test"])
    records: list[loop.Record] = []
    before = time.process_time()
    loop.fit(model, data, lambda record, save: records.append(record))
    told = {
        "dev": [record["dev_uar"] for record in records],
        "loss": [record["train_loss"] for record in records],
        "seconds": (time.process_time() - before) / EPOCHS,
        "parameters": records[-1]["trainable_parameters"],
    }
    write_json(run.file(given.scratch), told | tested(model, splits["test"], task))
    return run


def tested(model: EmotionClassifier, test: stream.Held, task: Task) -> dict[str, Any]:
    """What is said of test."""
    content, guesses = stream.content_of(model.prefix), {}
    for batch, logits_BK in loop.predict_batches(model, stream.short_to_long(test.rows, 60, content)):
        guesses |= dict(zip(batch.utterance_ids, logits_BK.argmax(-1).tolist(), strict=True))
    labels = task.labels("test")
    ids = sorted(guesses)
    return {
        "labels": [labels[i] for i in ids],
        "predicted": [guesses[i] for i in ids],
        "speakers": [i.rsplit("-", 1)[1].split(".")[0] for i in ids],
    }


def start(
    given: argparse.Namespace, run: Run, model: EmotionClassifier, data: loop.Data, task: Task, test: stream.Held
) -> None:
    """Make the head the linear probe, fitted once for all runs that have the same features whatever rate and seed."""
    method, variant, _ = WAYS[run.way]
    way = run.way if variant == "loftq" else next(name for name, settings in WAYS.items() if settings[0] == method)
    file = given.scratch / "probes" / f"{way}-{run.fold}.safetensors"
    if not file.is_file():
        features_NP, label_N = pooled(model, data.train(0))
        center_P, scale_P = features_NP.mean(0), features_NP.std(0) + 1e-5
        probe = LogisticRegression(C=model.experiment.head.probe_c, class_weight="balanced", max_iter=500)
        probe.fit((features_NP - center_P) / scale_P, label_N)
        found = (torch.from_numpy(part).float() for part in (center_P, scale_P, probe.coef_, probe.intercept_))
        model.head.start_from_probe(0, *found)
        with replacing(file) as aside:
            save_file(model.head.state_dict(), aside)
        write_json(Run(f"{PROBE} of {way}", 0, run.fold, 0).file(given.scratch), tested(model, test, task))
    model.head.load_state_dict(load_file(file))


@torch.inference_mode()
def pooled(model: EmotionClassifier, batches: Iterable[stream.Batch]) -> tuple[np.ndarray, np.ndarray]:
    """The head's input (N, P), of the last block, and the labels."""
    model.eval()
    found = [(model.head.embed(*model.hidden_states(b.inputs, b.lengths_B)), b.labels_B) for b in batches]
    features_NP, label_N = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return features_NP, label_N


def run_all(given: argparse.Namespace) -> None:
    """All runs that have not been made, the rates on fold 0 first."""
    first = space(given, Run("LoRA", RATES[0], 0, 0))
    shard_dirs = prepare.prepare(first, use_ray=False, console=Console(stderr=True))
    (given.scratch / "folds").mkdir(parents=True, exist_ok=True)
    (given.scratch / "runs").mkdir(exist_ok=True)
    for fold in range(FOLDS):
        file = given.scratch / "folds" / f"{fold}.parquet"
        load_task(space(given, Run("LoRA", RATES[0], fold, 0)).experiment, shard_dirs).write(file)
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for seed, method in itertools.product(range(given.seeds), ("lora", "qlora")):
            ways = [way for way in WAYS if WAYS[way][0] == method]
            form, directory = features(given, method, shard_dirs)

            def make(runs: list[Run], form: Any = form, directory: Path = directory) -> None:
                missing = [(given, run, form, directory) for run in runs if not run.file(given.scratch).is_file()]
                for number, run in enumerate(pool.imap(fit, missing), start=1):
                    print(f"{time.strftime('%H:%M:%S')} {number} of {len(missing)}: {run}", file=sys.stderr, flush=True)

            make([Run(way, rate, 0, 0) for way in ways for rate in RATES])
            chosen = rates(given.scratch)
            make([Run(way, chosen[way], fold, seed) for fold in range(FOLDS) for way in ways])


# -- what came of it


def read(scratch: Path, run: Run) -> dict[str, Any] | None:
    """What a run found; None if it has not been made."""
    return read_json(run.file(scratch)) if run.file(scratch).is_file() else None


def rates(scratch: Path) -> dict[str, float]:
    """Way -> its rate: that with the best dev UAR of fold 0 after the last epoch, the lowest of equals."""
    chosen = {}
    for way in WAYS:
        tried = {rate: found["dev"][-1] for rate in RATES if (found := read(scratch, Run(way, rate, 0, 0)))}
        if len(tried) == len(RATES):
            chosen[way] = max(tried, key=lambda rate: tried[rate])
    return chosen


def complete(scratch: Path, chosen: dict[str, float], seeds: int) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Way -> seed -> what its six folds found, where all six are there."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for way, rate in chosen.items():
        for seed in range(seeds):
            folds = [told for fold in range(FOLDS) if (told := read(scratch, Run(way, rate, fold, seed)))]
            if len(folds) == FOLDS:
                found.setdefault(way, {})[seed] = folds
    return found


def joined(runs: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, predictions and speakers of test, of several runs one after the other."""
    labels, predicted = (np.array([value for run in runs for value in run[key]]) for key in ("labels", "predicted"))
    return labels, predicted, [speaker for run in runs for speaker in run["speakers"]]


def figure(runs: list[dict[str, Any]]) -> str:
    """UAR on test, and its interval."""
    labels, predicted, speakers = joined(runs)
    low, high = bootstrap_ci95(labels, predicted, speakers, EMOTIONS)[0]["uar"]
    return f"{uar(confusion(labels, predicted, EMOTIONS)):.3f} [{low:.3f}, {high:.3f}]"


def row(way: str, rate: float, seeds: dict[int, list[dict[str, Any]]]) -> str:
    """One line of the first table."""
    runs = [run for folds in seeds.values() for run in folds]
    dev, loss = (statistics.mean(run[key][-1] for run in runs) for key in ("dev", "loss"))
    by_seed = [uar(confusion(*joined(folds)[:2], EMOTIONS)) for folds in seeds.values()]
    seconds = statistics.median(run["seconds"] for run in runs)
    return (
        f"| {way} | {rate:g} | {len(seeds)} | {loss:.2f} | {dev:.3f} | {figure(runs)} "
        f"| {' '.join(f'{one:.3f}' for one in by_seed)} | {runs[0]['parameters']:,} | {seconds:.0f} |"
    )


def gaps(found: dict[str, dict[int, list[dict[str, Any]]]], probes: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the second table: differences on the same utterances with the same seeds."""
    pairs = []
    for one, (_, _, other) in WAYS.items():
        both = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
        if both:
            pairs.append((one, other, *([run for s in both for run in found[way][s]] for way in (one, other))))
        if one in probes and one in found:
            seeds = found[one].values()
            pairs.append((one, PROBE, [run for folds in seeds for run in folds], probes[one] * len(seeds)))
    records = []
    for _, _, runs, others in pairs:
        (labels, predicted, speakers), (_, other_predicted, others_speakers) = joined(runs), joined(others)
        assert speakers == others_speakers
        records.append(gap_records(labels, predicted, other_predicted, speakers, EMOTIONS))
    lines = []
    for (one, other, runs, _), record in zip(pairs, corrected(records), strict=True):
        low, high = record["uar"]["ci95"] or (float("nan"), float("nan"))
        values = [100 * value for value in (record["uar"]["difference"], low, high)]
        p = [record["uar"][name] for name in ("p", "p_holm")]
        tested = " | ".join("" if value is None else f"{value:.3f}" for value in p)
        gap = f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"
        lines.append(f"| {one} over {other} | {len(runs) // FOLDS} | {gap} | {tested} |")
    return lines


def page(given: argparse.Namespace) -> str:
    """Tables of what is there."""
    scratch, chosen = given.scratch, rates(given.scratch)
    found = complete(scratch, chosen, given.seeds)
    probes = {way: [read(scratch, Run(f"{PROBE} of {way}", 0, fold, 0)) for fold in range(FOLDS)] for way in WAYS}
    whole = {way: [told for told in folds if told] for way, folds in probes.items() if all(folds)}
    tries = {way: {rate: read(scratch, Run(way, rate, 0, 0)) for rate in RATES} for way in WAYS}
    runs = [Run(way, chosen[way], fold, seed) for way in chosen for fold in range(FOLDS) for seed in range(given.seeds)]
    missing = [run for run in runs if not run.file(scratch).is_file()]
    not_complete = f"Not complete: of {len(runs)} runs {len(missing)} are missing; a seed counts with all six folds.\n"
    return PAGE.format(
        epochs=EPOCHS,
        block=FIRST_LAYER,
        missing=not_complete if missing else "",
        figures="\n".join(
            [
                *(f"| {PROBE} ({way}) | | | | | {figure(folds)} | | | |" for way, folds in whole.items()),
                *(row(way, chosen[way], seeds) for way, seeds in found.items()),
            ]
        ),
        gaps="\n".join(gaps(found, whole)),
        rates=" | ".join(f"{rate:g}" for rate in RATES),
        lines="|---" * len(RATES),
        tries="\n".join(
            f"| {way} | " + " | ".join(f"{told['dev'][-1]:.3f}" if told else "" for told in tried.values()) + " |"
            for way, tried in tries.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("ravdess", "backbone", "scratch"):
        parser.add_argument(name, type=lambda given: Path(given).resolve())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        run_all(given)
    print(page(given))


if __name__ == "__main__":
    main()
