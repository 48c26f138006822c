"""A part of enrolment.py: the gradient through a speaker's mean, stopped or not, in a small run of LoRA.

Training takes the vectors that voices are made of from a pass before each epoch, as constants. Here a step computes
them itself, with the weights that it has: the recordings that the speakers of its batch are known by run through the
adapted block beside the batch. Two ways differ by one thing: whether the gradient flows through their mean as well.

whisper-tiny.en, LoRA in its last block over cached features of what is below it; RAVDESS, the first of EmoBox's folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import enrolment_models as models
import numpy as np
import torch
from enrolment_models import CORPORA, Place, Rows
from sklearn.linear_model import LogisticRegression

from ser_ray import config
from ser_ray.config import SearchSpace
from ser_ray.disk import read_json, write_json
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models import prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.voice import Voice
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import feature_cache
from ser_ray.speech import cached_features, shards, stream
from ser_ray.training.speakers import pooled_vectors

SEEDS: Final = 3
EPOCHS: Final = 3
RATE: Final = 2e-4
SPEAKERS: Final = 2
"""Of a batch."""
EACH: Final = 16
"""Utterances of each of them."""
KNOWN: Final = 8
"""Recordings of each of them that are not in the batch; an utterance is answered with the first 0, 1, 2, 4 or 8."""
POINTS: Final = (0, 1, 4, 8, "others")


def space(place: Place) -> SearchSpace:
    """What is trained."""
    overrides = [
        f"experiment.corpora={{ravdess: {place.of('ravdess')}}}", "search={}", "tune.first=[]",
        f"experiment.backbone={place.of('whisper-tiny.en')}", "experiment.adapter.first_layer=3",
        "experiment.head={layer_mix: last, pooling: statistics, dropout: 0.2, speaker: center}",
    ]  # fmt: skip
    return config.load(models.SPACE, overrides)


def held(place: Place) -> tuple[Task, dict[str, stream.Held], cached_features.Prefix]:
    """Train and dev in memory, as the input of the last block."""
    experiment = space(place).experiment
    form = prefix.of(experiment, "fp32")
    directory, shard_dirs = place.scratch / "features" / form.key(), models.shard_dirs(place, "ravdess")
    directory.mkdir(parents=True, exist_ok=True)
    extractor = feature_cache.Extractor(1, 0)
    for shard in [path for own in shard_dirs for path in shards.shard_paths(own)]:
        if not (directory / shard.name).is_file():
            extractor.extract(form, shard, directory / shard.name)
    task = load_task(experiment, shard_dirs)
    splits = ("train", "dev")
    return task, {s: stream.Files(task.rows(s), cached_features.COLUMN, directory).hold() for s in splits}, form


def started(experiment: Any, form: cached_features.Prefix, train: stream.Held) -> EmotionClassifier:
    """A model whose head is the probe of the last layer."""
    model = build(experiment)
    model.prefix = form
    content = stream.content_of(form)
    ids, pooled_NP = pooled_vectors(model, stream.short_to_long(train.rows, 60, content), models.alone)
    known = train.rows["utterance_id"].to_pylist()
    of = {name: dict(zip(known, train.rows[name].to_pylist(), strict=True)) for name in ("label", "speaker")}
    assert model.head.speaker is not None
    model.head.speaker.fit(pooled_NP, [of["speaker"][i] for i in ids])
    features_NP = model.head.relative(pooled_NP).numpy()
    center_P, scale_P = features_NP.mean(0), features_NP.std(0) + 1e-5
    probe = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
    probe.fit((features_NP - center_P) / scale_P, [of["label"][i] for i in ids])
    found = (center_P, scale_P, probe.coef_, probe.intercept_)
    model.head.start_from_probe(0, *(torch.from_numpy(part).float() for part in found))
    return model


def batches(speakers: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """The rows of a batch, and those that each of its utterances is answered with; all utterances but a few once."""
    names = np.array(speakers)
    order = {name: list(rng.permutation(np.flatnonzero(names == name))) for name in sorted(set(speakers))}
    while True:
        full = [name for name in order if len(order[name]) >= EACH]
        if len(full) < SPEAKERS:
            return
        rows, answered = [], []
        for name in rng.choice(full, SPEAKERS, replace=False):
            own = [order[name].pop() for _ in range(EACH)]
            others = rng.permutation(np.setdiff1d(np.flatnonzero(names == name), own))[:KNOWN]
            rows += own
            answered += [others[: rng.choice([0, 1, 2, 4, 8])] for _ in own]
        yield np.array(rows), answered


def loss_of(model: EmotionClassifier, batch: stream.Batch, answered: list[np.ndarray], through: bool) -> torch.Tensor:
    """``batch``: the utterances, and behind them all that they are answered with; ``answered``: their places in it."""
    pooled_NP = model.pooled(batch.inputs, batch.lengths_B)
    count = len(answered)
    source_NP = (pooled_NP if through else pooled_NP.detach()).double()
    share_BN = torch.zeros(count, len(pooled_NP), dtype=torch.float64)
    for row, places in enumerate(answered):
        share_BN[row, places] = 1 / max(1, len(places))
    counts_B = torch.tensor([len(places) for places in answered], dtype=torch.float64)
    mean_BP = share_BN @ source_NP
    voices = Voice(counts_B, mean_BP, torch.zeros_like(mean_BP))
    logits_BK = model.head.classify(model.head.relative(pooled_NP[:count], voices))
    return torch.nn.functional.cross_entropy(logits_BK, batch.labels_B[:count])


def run(place: Place, seed: int, through: bool) -> list[dict[str, float]]:
    """Dev UAR by the number of recordings, after each epoch; before the first as well."""
    task, splits, form = held(place)
    experiment = space(place).experiment.model_copy(update={"seed": seed})
    torch.manual_seed(seed)
    model, content = started(experiment, form, splits["train"]), stream.content_of(form)
    rng = np.random.default_rng(seed)
    rows = splits["train"].rows
    names = rows["speaker"].to_pylist()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    told = [scores(model, task, splits, content)]
    for _ in range(EPOCHS):
        model.train()
        for own, answered in batches(names, rng):
            known = np.unique(np.concatenate(answered)).astype(int)
            place_of = {row: len(own) + n for n, row in enumerate(known)}
            (batch,) = stream.batches(rows, [np.concatenate([own, known])], content=content)
            loss = loss_of(model, batch, [np.array([place_of[r] for r in one], int) for one in answered], through)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        told.append(scores(model, task, splits, content))
        models.say(f"gradient: {'through' if through else 'stopped'}, seed {seed}: {told[-1]}")
    return told


def scores(
    model: EmotionClassifier, task: Task, splits: dict[str, stream.Held], content: stream.Content
) -> dict[str, float]:
    """Dev UAR with the average speaker of the current weights."""
    ids, train_NP = pooled_vectors(model, stream.short_to_long(splits["train"].rows, 60, content), models.alone)
    rows = splits["train"].rows
    speakers = dict(zip(rows["utterance_id"].to_pylist(), rows["speaker"].to_pylist(), strict=True))
    assert model.head.speaker is not None
    model.head.speaker.fit(train_NP, [speakers[i] for i in ids])
    dev_NP = pooled_vectors(model, stream.short_to_long(splits["dev"].rows, 60, content), models.alone)[1]
    own, number = Rows.of(task, "dev"), len(CORPORA["ravdess"].emotions)
    found = models.answers(model, dev_NP, models.known(dev_NP, own, POINTS))
    return {
        point: float(np.mean([uar(confusion(own.labels, one.argmax(1), number)) for one in draws]))
        for point, draws in found.items()
    }


WAYS: Final = {"stopped, as in training": False, "through the mean": True}


def made(place: Place, seed: int, through: bool) -> None:
    """One run, if it has not been made."""
    file = _file(place, seed, through)
    if not file.is_file():
        write_json(file, run(place, seed, through))


def found(place: Place) -> dict[str, list[list[dict[str, float]]]]:
    """Way -> the seeds of which both runs are there -> epochs -> dev UAR."""
    seeds = [seed for seed in range(SEEDS) if all(_file(place, seed, way).is_file() for way in WAYS.values())]
    return {name: [read_json(_file(place, seed, way)) for seed in seeds] for name, way in WAYS.items()}


def _file(place: Place, seed: int, through: bool) -> Path:
    return place.scratch / f"gradient-{'through' if through else 'stopped'}-{seed}.json"


def lines(told: dict[str, list[list[dict[str, float]]]]) -> Iterator[str]:
    """``told``: way -> seeds -> epochs -> dev UAR."""
    yield f"| | {' | '.join('k = 0' if p == 0 else str(p) for p in POINTS)} | of each seed, k = 8 |"
    yield "|---" * (len(POINTS) + 2) + "|"
    first = next(iter(told.values()))
    yield f"| the probe | {' | '.join(f'{np.mean([s[0][str(p)] for s in first]):.3f}' for p in POINTS)} | |"
    for way, seeds in told.items():
        means = [f"{np.mean([seed[-1][str(p)] for seed in seeds]):.3f}" for p in POINTS]
        each = " ".join(f"{seed[-1]['8']:.3f}" for seed in seeds)
        yield f"| {way} | {' | '.join(means)} | {each} |"
