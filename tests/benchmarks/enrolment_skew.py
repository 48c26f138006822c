"""A part of enrolment.py: what it costs when the recordings that a speaker is known by are not like those answered.

One emotion only, neutral, another channel, another person by mistake: RAVDESS, one model of the table, the same
utterances. The shrinkage that each asks for is the one with the best dev UAR. And how well the distance of recordings
to a voice tells another person from the same one.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import enrolment_models as models
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr
import torch
from enrolment_models import CORPORA, Place, Rows, Way

from ser_ray.config import Augment, Enrolment
from ser_ray.disk import read_json, write_json
from ser_ray.evaluation.enrolment import answered_with
from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.voice import SpeakerNorm, Voice, voices_of
from ser_ray.runtime import feature_cache
from ser_ray.speech import augment, cached_features, shards, stream
from ser_ray.speech.audio import from_int16, to_int16
from ser_ray.training.enrolment import probabilities

COUNTS: Final = (4, 8)
SHRINKAGES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
DRAWS: Final = 5
CHANNELS: Final = ("noise of 10 dB", "telephone, 8 kHz, mu-law")
ANY: Final = "any"
RATE: Final = 16_000


def varied(channel: str, waveform: np.ndarray, utterance_id: str) -> np.ndarray:
    """A recording as another microphone or line would give it, of the same length."""
    if channel == CHANNELS[0]:
        return augment.augmented(waveform, utterance_id, Augment(noise_snr_db=(10, 10)), 0)
    file = io.BytesIO()
    soundfile.write(file, soxr.resample(waveform, RATE, 8_000), 8_000, format="WAV", subtype="ULAW")
    file.seek(0)
    heard = soxr.resample(soundfile.read(file, dtype="float32")[0], 8_000, RATE)
    return np.pad(heard, (0, max(0, len(waveform) - len(heard))))[: len(waveform)]


def channel_features(place: Place, way: Way, channel: str) -> Any:
    """The directory of the features of all recordings over another channel; made where they are missing."""
    form, _ = models.features(place, way.corpus, way.backbone)
    number = CHANNELS.index(channel)
    extractor = feature_cache.Extractor(1, 0)
    directory, speech = (place.scratch / f"{what}-{number}" / form.key() for what in ("features", "speech"))
    for path in (directory, speech):
        path.mkdir(parents=True, exist_ok=True)
    for shard in [path for own in models.shard_dirs(place, way.corpus) for path in shards.shard_paths(own)]:
        if not (directory / shard.name).is_file():
            table = pq.read_table(shard)
            pairs = zip(table["utterance_id"].to_pylist(), table["audio"], strict=True)
            heard = [to_int16(varied(channel, from_int16(one.as_buffer()), i)).tobytes() for i, one in pairs]
            place_of = table.column_names.index("audio")
            pq.write_table(table.set_column(place_of, "audio", pa.array(heard, pa.large_binary())), speech / shard.name)
            extractor.extract(form, speech / shard.name, directory / shard.name)
            models.say(f"{channel}: {shard.name}")
    return directory


def over_channel(place: Place, way: Way, model: EmotionClassifier, fold: int, split: str, channel: str) -> torch.Tensor:
    """pooled_NP over another channel."""
    rows = models.task(place, way.corpus, fold).rows(split)
    held = stream.Files(rows, cached_features.COLUMN, channel_features(place, way, channel)).hold()
    content = stream.content_of(model.prefix)
    return models.pooled_vectors(model, stream.short_to_long(held.rows, 60, content), models.alone)[1]


def conditions(emotions: Sequence[str]) -> list[str]:
    """What is enrolled."""
    one = [f"{emotion} alone" for emotion in emotions]
    mixed = ["neutral and calm alone", *CHANNELS, "a quarter of another person", "another person"]
    return [ANY, *one, *mixed]


def enrolled(condition: str, rows: Rows, vectors: dict[str, torch.Tensor], count: int, draw: int) -> Voice:
    """What is known of the speaker of every row."""
    which: Any = "any"
    if condition.endswith(" alone"):
        which = tuple(condition.removesuffix(" alone").split(" and "))
    settings = Enrolment(which=which)
    chosen = answered_with(rows.ids, rows.speakers, rows.emotions, settings, count, draw)
    if "another person" in condition:
        names = sorted(set(rows.speakers))
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        of_name = {name: chosen[rows.speakers.index(name)] for name in names}
        others = [of_name[following[name]] for name in rows.speakers]
        kept = 0 if condition == "another person" else count - count // 4
        chosen = [np.concatenate([own[:kept], other[kept:]]) for own, other in zip(chosen, others, strict=True)]
    return voices_of(vectors.get(condition, vectors[ANY]), chosen)


def measured(place: Place, way: Way, split: str) -> dict[str, Any]:
    """Condition -> number of recordings -> shrinkage -> predicted labels of all folds and draws; and the truth."""
    emotions = CORPORA[way.corpus].emotions
    found: dict[str, Any] = {name: {c: {s: [] for s in SHRINKAGES} for c in COUNTS} for name in conditions(emotions)}
    truth: dict[str, list[Any]] = {"labels": [], "speakers": [], "nobody": []}
    for fold in range(CORPORA[way.corpus].folds):
        model, rows = models.trained(place, way, fold), Rows.of(models.task(place, way.corpus, fold), split)
        norm = model.head.speaker
        assert norm is not None
        own = models.pooled(model, models.data(place, way.corpus, way.backbone, fold), split)
        vectors = {ANY: own}
        vectors |= {c: over_channel(place, way, model, fold, split, c) for c in CHANNELS}
        nobody = probabilities(model, own, voices_of(own, [np.empty(0, int)] * len(own)).at).argmax(1)
        for draw in range(DRAWS):
            truth["labels"] += rows.labels.tolist()
            truth["speakers"] += rows.speakers
            truth["nobody"] += nobody.tolist()
            for name in found:
                for count in COUNTS:
                    voices = enrolled(name, rows, vectors, count, draw)
                    for shrinkage in SHRINKAGES:
                        change = {"speaker_shrinkage": shrinkage}
                        norm.settings = norm.settings.model_copy(update=change)
                        found[name][count][shrinkage] += probabilities(model, own, voices.at).argmax(1).tolist()
        models.say(f"skew: {split} of fold {fold}")
    if split == "test":
        with (place.scratch / "openings.jsonl").open("a") as log:
            log.write(json.dumps({"skew": way, "date": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    return {"found": found, "truth": truth}


def made(place: Place, way: Way, split: str) -> tuple[Any, Any]:
    """What `measured` and `distances` tell of a split, made before or now."""
    told = []
    for name, make in (("skew", measured), ("distance", distances)):
        file = _file(place, way, name, split)
        if not file.is_file():
            write_json(file, make(place, way, split))
        told.append(read_json(file))
    return told[0], told[1]


def is_made(place: Place, way: Way) -> bool:
    """Whether the page has all that it shows."""
    return all(_file(place, way, name, split).is_file() for name in ("skew", "distance") for split in ("dev", "test"))


def _file(place: Place, way: Way, name: str, split: str) -> Path:
    return place.scratch / f"{name}-{way.backbone}-{split}.json"


def lines(place: Place, way: Way) -> Iterator[str]:
    """The table."""
    dev, test = (made(place, way, split)[0] for split in ("dev", "test"))
    number = len(CORPORA[way.corpus].emotions)

    def score(told: Any, predicted: list[int]) -> float:
        return float(uar(confusion(np.array(told["truth"]["labels"]), np.array(predicted), number)))

    own = f"{way.shrinkage:g}"
    yield "| enrolled | k = 4 | over k = 0 | k = 8 | over k = 0 | shrinkage it asks for | with it: k = 4 | k = 8 |"
    yield "|---|---|---|---|---|---|---|---|"
    nobody = score(test, test["truth"]["nobody"])
    for name, by_count in test["found"].items():
        on_dev = dev["found"][name]
        values = {s: sum(score(dev, on_dev[str(c)][str(s)]) for c in COUNTS) for s in SHRINKAGES}
        asked = max(values, key=lambda s: values[s])
        cells = []
        for count in COUNTS:
            predicted = np.array(by_count[str(count)][str(float(own))])
            limits = bootstrap_ci95(np.array(test["truth"]["labels"]), predicted, test["truth"]["speakers"], number)
            low, high = limits[0]["uar"]
            value = score(test, predicted.tolist())
            cells += [f"{value:.3f} [{low:.3f}, {high:.3f}]", f"{100 * (value - nobody):+.1f}"]
        with_it = [f"{score(test, by_count[str(count)][str(asked)]):.3f}" for count in COUNTS]
        yield f"| {name} | {' | '.join(cells)} | {asked:g} | {' | '.join(with_it)} |"
    yield ""
    yield f"With nothing enrolled: {nobody:.3f}. The model's own shrinkage is {own}."


# -- another person


ANSWERED: Final = (1, 4, 8)
KNOWN: Final = (1, 4, 8, 16)
ROUNDS: Final = 30


def distances(place: Place, way: Way, split: str) -> dict[str, Any]:
    """Number answered, number enrolled -> the mean distance of the answered, in `ROUNDS` draws for every speaker."""
    found: dict[str, dict[str, list[float]]] = {}
    for fold in range(CORPORA[way.corpus].folds):
        model, rows = models.trained(place, way, fold), Rows.of(models.task(place, way.corpus, fold), split)
        pooled_NP = models.pooled(model, models.data(place, way.corpus, way.backbone, fold), split)
        norm, names, rng = model.head.speaker, sorted(set(rows.speakers)), np.random.default_rng(fold)
        assert norm is not None
        of_name = {name: np.flatnonzero(np.array(rows.speakers) == name) for name in names}
        for name in names:
            for _ in range(ROUNDS):
                other = of_name[str(rng.choice([one for one in names if one != name]))]
                for answered in ANSWERED:
                    for known in KNOWN:
                        _one(found, norm, pooled_NP, rows, of_name[name], other, answered, known, rng)
    return found


def _one(
    found: dict[str, dict[str, list[float]]],
    norm: SpeakerNorm,
    pooled_NP: torch.Tensor,
    rows: Rows,
    own: np.ndarray,
    other: np.ndarray,
    answered: int,
    known: int,
    rng: np.random.Generator,
) -> None:
    """A draw: the same person in any emotions and in one, and another person."""
    drawn = rng.permutation(own)
    voice = voices_of(pooled_NP, [drawn[:known]])
    left = drawn[known:]
    emotion = rows.emotions[left[0]]
    asked = {
        "same": left[:answered],
        "same, one emotion": np.array([row for row in left if rows.emotions[row] == emotion])[:answered],
        "other": rng.choice(other, answered, replace=False),
    }
    one_emotion = np.array([row for row in own if rows.emotions[row] == emotion])
    for name, chosen in asked.items():
        distance = norm.distance(pooled_NP[chosen], voice.at([0] * len(chosen))).mean()
        found.setdefault(f"{answered} {known}", {}).setdefault(name, []).append(float(distance))
    if known <= 4:  # as many recordings has a speaker of every emotion, and as many are left to be answered
        voice = voices_of(pooled_NP, [one_emotion[:known]])
        rest = np.setdiff1d(own, one_emotion[:known])
        chosen = rng.choice(rest, answered, replace=False)
        distance = norm.distance(pooled_NP[chosen], voice.at([0] * answered)).mean()
        found[f"{answered} {known}"].setdefault("one emotion enrolled", []).append(float(distance))


def distance_lines(place: Place, way: Way, limits: dict[int, float]) -> Iterator[str]:
    """How often the limit is passed by the same and by another person."""
    dev, test = (made(place, way, split)[1] for split in ("dev", "test"))
    yield (
        "| answered | enrolled | dev: 95 % of the same person below | limit | test: same person above "
        "| one emotion answered | one emotion enrolled | another person above |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for key, told in test.items():
        answered, known = map(int, key.split())
        limit = limits[max(n for n in limits if n <= answered)]
        shares = [
            f"{np.mean(np.array(told[name]) > limit):.3f}" if name in told else ""
            for name in ("same", "same, one emotion", "one emotion enrolled", "other")
        ]
        yield (
            f"| {answered} | {known} | {np.quantile(dev[key]['same'], 0.95):.2f} | {limit:g} | {' | '.join(shares)} |"
        )
