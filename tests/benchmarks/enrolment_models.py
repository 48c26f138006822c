"""The models of enrolment.py: frozen encoders with a head, trained on cached features as the project trains them.

A `Way` is a model's settings, a `Scores` what it answers for dev and test of all folds, with recordings of each speaker
known. What is done is kept in the folder ``scratch`` and not done again.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from ser_ray import config, prepare
from ser_ray.config import OTHERS, Enrolment, Experiment
from ser_ray.disk import replacing
from ser_ray.evaluation.enrolment import answered_with, draws_of
from ser_ray.evaluation.predictions import Predictions
from ser_ray.models import prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.voice import SMALLEST, Others, Voice, voices_of
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import feature_cache, feed
from ser_ray.speech import cached_features, shards, stream
from ser_ray.training import loop
from ser_ray.training.enrolment import probabilities
from ser_ray.training.probe import start_from_probe
from ser_ray.training.speakers import pooled_vectors

SPACE: Final = Path(__file__).resolve().parents[2] / "search_spaces" / "ravdess_emobox.yaml"
EPOCHS: Final = 1
"""After the probe, which is epoch 0; dev chooses between the two."""
SETTINGS: Final = Enrolment()
"""The points of the curve, and the draws: the project's defaults."""


class Corpus(NamedTuple):
    """A corpus, and how it is split."""

    name: str
    emotions: tuple[str, ...]
    protocol: str
    folds: int
    about: str


CORPORA: Final = {
    "ravdess": Corpus(
        "RAVDESS",
        ("angry", "calm", "disgust", "fear", "happy", "neutral", "sad", "surprised"),
        "{scheme: given_folds, given: emobox}",
        6,
        "Eight emotions, 1,440 utterances, 24 speakers; EmoBox's six folds, four test and four dev speakers in each.",
    ),
    "emodb": Corpus(
        "EmoDB",
        ("angry", "boredom", "disgust", "fear", "happy", "neutral", "sad"),
        "{scheme: leave_one_speaker_out}",
        10,
        "Seven emotions, 535 utterances, 10 speakers; every speaker is the test speaker once, two others are dev. In "
        "this copy every utterance is cut or padded to 2.0 s, so the figures are not comparable with others.",
    ),
}


class Way(NamedTuple):
    """The settings of a model."""

    corpus: str
    backbone: str
    layers: str
    """``head.layer_mix``: concat, or weighted, of which the probe takes the best layer."""
    speaker: str
    c: float
    shrinkage: float

    def __str__(self) -> str:
        known = "" if self.speaker == "none" else f", s = {self.shrinkage:g}"
        layers = "all layers" if self.layers == "concat" else "one layer"
        return f"{self.backbone}, {layers}, {self.speaker}, C = {self.c:g}{known}"

    def file(self, scratch: Path, kind: str, fold: int, suffix: str = "npz") -> Path:
        return scratch / kind / f"{'-'.join(map(str, self))}-{fold}.{suffix}"


class Place(NamedTuple):
    """Where the data are, and what is made of them."""

    data: tuple[tuple[str, Path], ...]
    """Names of corpora, and their directories."""
    backbones: tuple[tuple[str, Path], ...]
    scratch: Path

    def of(self, name: str) -> Path:
        """The directory of a corpus or a backbone."""
        return dict(self.data + self.backbones)[name]


def experiment(place: Place, way: Way, fold: int) -> Experiment:
    """What the project is told."""
    corpus = CORPORA[way.corpus]
    overrides = [
        f"experiment.corpora={{{way.corpus}: {place.of(way.corpus)}}}", f"experiment.protocol={corpus.protocol}",
        f"experiment.protocol.fold={fold}", f"experiment.emotions=[{', '.join(corpus.emotions)}]",
        f"experiment.backbone={place.of(way.backbone)}", "experiment.adapter={method: frozen}",
        f"experiment.head.layer_mix={way.layers}", f"experiment.head.probe_c={way.c}",
        f"experiment.head.speaker={way.speaker}", f"experiment.head.speaker_shrinkage={way.shrinkage}",
        f"experiment.epochs={EPOCHS}", f"experiment.patience={EPOCHS}", "search={}", "tune.first=[]",
    ]  # fmt: skip
    return config.load(SPACE, overrides).experiment


@functools.lru_cache
def shard_dirs(place: Place, name: str) -> list[Path]:
    """The prepared corpus."""
    space = config.load(SPACE, [f"experiment.corpora={{{name}: {place.of(name)}}}", f"storage.cache={place.scratch}"])
    return prepare.prepare(space, use_ray=False, console=Console(stderr=True))


@functools.lru_cache
def features(place: Place, name: str, backbone: str) -> tuple[cached_features.Prefix, Path]:
    """The moments of all recordings, and the directory where they are; made where they are missing."""
    form = prefix.of(experiment(place, Way(name, backbone, "concat", "none", 0.01, 2), 0), "fp32")
    extractor, directory = feature_cache.Extractor(1, 0), place.scratch / "features" / form.key()
    directory.mkdir(parents=True, exist_ok=True)
    for shard in [path for own in shard_dirs(place, name) for path in shards.shard_paths(own)]:
        if not (directory / shard.name).is_file():
            extractor.extract(form, shard, directory / shard.name)
            say(f"{name}, {backbone}: {shard.name}")
    return form, directory


@functools.lru_cache
def task(place: Place, name: str, fold: int) -> Task:
    """A fold of a corpus."""
    described = experiment(place, Way(name, place.backbones[0][0], "concat", "none", 0.01, 2), fold)
    return load_task(described, shard_dirs(place, name))


class Data(NamedTuple):
    """A fold's features in memory."""

    splits: dict[str, stream.Held]
    content: stream.Content

    def batches(self, split: str) -> Any:
        return stream.short_to_long(self.splits[split].rows, 60, self.content)


@functools.lru_cache(maxsize=6)
def data(place: Place, name: str, backbone: str, fold: int) -> Data:
    """One fold of a corpus: ``test`` is read here, and answered by `scored` alone."""
    form, directory = features(place, name, backbone)
    own, names = task(place, name, fold), ("train", "dev", "test")
    held = {split: stream.Files(own.rows(split), cached_features.COLUMN, directory).hold() for split in names}
    return Data(held, stream.content_of(form))


def speakers_of(own: Data, split: str) -> dict[str, str]:
    rows = own.splits[split].rows
    return dict(zip(rows["utterance_id"].to_pylist(), rows["speaker"].to_pylist(), strict=True))


def probed(place: Place, way: Way, fold: int) -> EmotionClassifier:
    """A model that is the probe: epoch 0 of the project's training, written out to leave out the other epochs."""
    own = data(place, way.corpus, way.backbone, fold)
    model = unfitted(place, way, fold)
    speakers = speakers_of(own, "train") if way.speaker != "none" else {}
    start_from_probe(model, own.batches("train"), own.batches("dev"), alone, speakers)
    if model.head.speaker is not None:
        ids, pooled_NP = pooled_vectors(model, own.batches("train"), alone)
        model.head.speaker.fit(pooled_NP, [speakers[i] for i in ids])
    return model


def unfitted(place: Place, way: Way, fold: int) -> EmotionClassifier:
    model = build(experiment(place, way, fold))
    model.prefix = features(place, way.corpus, way.backbone)[0]
    return model


def trained(place: Place, way: Way, fold: int) -> EmotionClassifier:
    """A model as the project trains it, with the weights of its best epoch on dev; found again if it is there."""
    model = unfitted(place, way, fold)
    file = way.file(place.scratch, "heads", fold, "safetensors")
    if not file.is_file():
        own = data(place, way.corpus, way.backbone, fold)
        source = feed.data(model.experiment, own.splits["train"], own.splits["dev"], own.content)
        best: dict[str, torch.Tensor] = {}
        records: list[loop.Record] = []

        def on_epoch(record: loop.Record, save: loop.Save) -> None:
            records.append(record)
            if record["best_epoch"] == record["epoch"]:
                best.update({name: tensor.clone() for name, tensor in model.head.state_dict().items()})

        torch.manual_seed(fold)
        loop.fit(model, source, on_epoch)
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {"best_epoch": str(records[-1]["best_epoch"]), "dev": json.dumps([r["dev_uar"] for r in records])}
        with replacing(file) as aside:
            save_file(best, aside, told)
    model.head.load_state_dict(load_file(file))
    return model.eval()


def pooled(model: EmotionClassifier, own: Data, split: str) -> torch.Tensor:
    """pooled_NP of a split, in order of utterance id."""
    return pooled_vectors(model, own.batches(split), alone)[1]


class Rows(NamedTuple):
    """A split in order of utterance id."""

    ids: list[str]
    speakers: list[str]
    emotions: list[str]
    labels: np.ndarray

    @classmethod
    def of(cls, task: Task, split: str) -> Rows:
        rows = task.rows(split).sort_by("utterance_id")
        columns = (rows[name].to_pylist() for name in ("utterance_id", "speaker", "emotion"))
        return cls(*columns, rows["label"].to_numpy())


Curve = dict[str, list[np.ndarray]]
"""Number of recordings -> (N, K) probabilities of every draw."""


def known(
    pooled_NP: torch.Tensor,
    rows: Rows,
    points: Sequence[int | str] = SETTINGS.recordings,
    settings: Enrolment = SETTINGS,
) -> Iterator[tuple[str, Voice]]:
    """What is known of the speaker of every row, at each number of recordings, in every draw."""
    others = Others(pooled_NP, rows.speakers, rows.ids)
    for recordings in points:
        for draw in draws_of(settings, recordings):
            if recordings == OTHERS and settings.which == "any":
                yield str(recordings), others.at(range(len(rows.ids)))
                continue
            chosen = answered_with(rows.ids, rows.speakers, rows.emotions, settings, recordings, draw)
            yield str(recordings), voices_of(pooled_NP, chosen)


def answers(model: EmotionClassifier, pooled_NP: torch.Tensor, voices: Iterable[tuple[str, Voice]]) -> Curve:
    """What a model answers with what is known of speakers; a model that uses nothing of it the same at once."""
    found: Curve = {}
    for point, voice in voices:
        if model.head.speaker is not None or not found:
            found.setdefault(point, []).append(probabilities(model, pooled_NP, voice.at))
    return found


def kept(file: Path, make: Callable[[], Curve]) -> Curve:
    """What was made before, or is made now."""
    if not file.is_file():
        arrays = {f"{point}/{n}": array for point, draws in make().items() for n, array in enumerate(draws)}
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as aside, aside.open("wb") as opened:
            np.savez(opened, **arrays)
    with np.load(file) as held:
        found: Curve = {}
        for name in held.files:
            found.setdefault(name.split("/")[0], []).append(held[name])
    return found


def tried(place: Place, way: Way, fold: int, points: Sequence[int | str], shrinkages: Sequence[float]) -> Curve:
    """Dev's answers of the probe. One file has those of every `head.speaker` and shrinkage, of one probe."""
    fitted = way._replace(speaker="center", shrinkage=shrinkages[0])

    def make() -> Curve:
        own = data(place, way.corpus, way.backbone, fold)
        model, rows = probed(place, fitted, fold), Rows.of(task(place, way.corpus, fold), "dev")
        pooled_NP, found = pooled(model, own, "dev"), {}
        voices = list(known(pooled_NP, rows, points))
        for speaker in ("center", "standardize"):
            if speaker == "standardize":
                standardise(model)
            for shrinkage in shrinkages:
                change = {"speaker": speaker, "speaker_shrinkage": shrinkage}
                model.head.speaker.settings = model.head.speaker.settings.model_copy(update=change)
                for point, draws in answers(model, pooled_NP, voices).items():
                    found[f"{speaker} {shrinkage:g} {point}"] = draws
        say(f"tried: fold {fold}, {fitted}")
        return found

    whole = kept(fitted.file(place.scratch, "tried", fold), make)
    if way.speaker == "none":
        return {"0": whole[f"center {fitted.shrinkage:g} 0"]}
    return {str(point): whole[f"{way.speaker} {way.shrinkage:g} {point}"] for point in points}


def all_tried(place: Place, way: Way, shrinkages: Sequence[float]) -> bool:
    """Whether all folds have been answered by `tried`."""
    fitted = way._replace(speaker="center", shrinkage=shrinkages[0])
    return all(fitted.file(place.scratch, "tried", fold).is_file() for fold in range(CORPORA[way.corpus].folds))


def all_scored(place: Place, way: Way) -> bool:
    """Whether all folds have been answered by `scored`."""
    folds, splits = range(CORPORA[way.corpus].folds), ("dev", "test")
    return all(way.file(place.scratch, f"scored-{split}", fold).is_file() for fold in folds for split in splits)


def standardise(model: EmotionClassifier) -> None:
    """Of the probe for `center` the same probe for `standardize`, whose input is divided by the average deviation."""
    deviation_P = (model.head.speaker.variance_P + SMALLEST).sqrt()
    model.head.center_P /= deviation_P
    model.head.scale_P /= deviation_P


def scored(place: Place, way: Way, fold: int, split: str) -> Curve:
    """A trained model's answers for a split. Each look at test is a line of openings.jsonl."""

    def make() -> Curve:
        own, model = data(place, way.corpus, way.backbone, fold), trained(place, way, fold)
        if split == "test":
            with (place.scratch / "openings.jsonl").open("a") as log:
                log.write(json.dumps({"way": way, "fold": fold, "date": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        say(f"scored: {split} of fold {fold}, {way}")
        pooled_NP = pooled(model, own, split)
        return answers(model, pooled_NP, known(pooled_NP, Rows.of(task(place, way.corpus, fold), split)))

    return kept(way.file(place.scratch, f"scored-{split}", fold), make)


def predictions(own: Task, split: str, probabilities_NK: np.ndarray) -> Predictions:
    """Answers with what they are of."""
    rows = Rows.of(own, split)
    names = tuple(name.partition("/")[0] for name in rows.ids)
    return Predictions(own.emotions, tuple(rows.ids), names, tuple(rows.speakers), rows.labels, probabilities_NK)


def alone(value: Any) -> list[Any]:
    """Of one process."""
    return [value]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
