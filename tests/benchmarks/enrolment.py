"""What unlabelled recordings of a speaker are worth: RAVDESS and EmoDB, by how many are known, single models and sets.

    python tests/benchmarks/enrolment.py RAVDESS EMODB TINY BASE SCRATCH > results/benchmarks/enrolment.md

TINY and BASE are directories with the encoders of whisper-tiny.en and whisper-base. What is done is kept in SCRATCH and
not done again; with --page nothing is computed, and the page has what is there.

Settings are chosen by the probe (epoch 0) on the dev splits of all folds together: the mean of UAR with no, 8 and all
other recordings. The probe is the same for every `head.speaker` and shrinkage, so it is fitted once for all of them.
What was chosen is then trained by the project's loop, and answers dev and test once. A set of models answers with the
normalised product of their probabilities; its members are added one by one, each the best for dev.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import enrolment_gradient as gradient
import enrolment_models as models
import enrolment_skew as skew
import numpy as np
from enrolment_models import CORPORA, SETTINGS, Place, Way
from safetensors import safe_open

from ser_ray.config import OTHERS
from ser_ray.evaluation import plots
from ser_ray.evaluation.enrolment import Enrolled, curve
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.metrics import confusion, uar
from ser_ray.evaluation.predictions import Predictions, pooled
from ser_ray.training.enrolment import FAR, FAR_TOGETHER, SEVERAL

BACKBONES: Final = ("whisper-base", "whisper-tiny.en")
KINDS: Final = (("concat", "none"), ("concat", "center"), ("concat", "standardize"), ("weighted", "center"))
"""`head.layer_mix` and `head.speaker`; the last one is there for the sets, whose members should differ."""
ORDER: Final = tuple(
    (corpus, backbone, kind)
    for kind, corpus, backbone in itertools.product(
        (KINDS[1], KINDS[0], KINDS[3], KINDS[2]), ("ravdess", "emodb"), reversed(BACKBONES)
    )
)
"""What is measured first: centring, on the smaller encoder."""
CS: Final = {"concat": (0.001, 0.003, 0.01), "weighted": (0.01,)}
"""`head.probe_c`: one layer has a seventh of the features, and the default was chosen for as many."""
SHRINKAGES: Final = (1.0, 2.0, 4.0, 8.0)
CHOOSING: Final = (0, 8, OTHERS)
"""The points of the curve that settings are chosen by: few, as dev is answered for every candidate."""
POINTS: Final = tuple(map(str, SETTINGS.recordings))
LARGEST: Final = 4
"""Models of a set."""
PICTURE: Final = Path(__file__).resolve().parents[2] / "results" / "benchmarks" / "enrolment.png"
PAGE: Final = """\
# What unlabelled recordings of a speaker are worth

```
python tests/benchmarks/enrolment.py RAVDESS EMODB TINY BASE SCRATCH > results/benchmarks/enrolment.md
```

Frozen encoders of openai/whisper-tiny.en (8.2 million parameters) and openai/whisper-base (20.6 million), and a linear
head over statistics of their layers: `head.init: probe`, then {epochs} epochs of `head_lr: 1e-5`, of which dev takes
the best, the probe among them. Every figure is UAR over the test utterances of all folds together, each predicted by a
model that never heard its speaker; those with k > 0 **used k unlabelled recordings of the speaker**, none of them the
one that is answered, mean of {draws} draws. "others": all other recordings of the speaker. 95 % intervals over
speakers. A set of models answers with the normalised product of their probabilities.

![UAR by how many recordings of a speaker are known](enrolment.png)
"""


def candidates(corpus: str) -> list[Way]:
    """All ways that dev chooses among: of the kinds of `KINDS` every C and every shrinkage."""
    return [
        Way(corpus, backbone, layers, speaker, c, shrinkage)
        for backbone, (layers, speaker) in itertools.product(BACKBONES, KINDS)
        for c, shrinkage in itertools.product(CS[layers], SHRINKAGES if speaker != "none" else (2.0,))
    ]


# -- figures


def probabilities(draws: Mapping[str, list[np.ndarray]], point: str) -> list[np.ndarray]:
    """At one point of the curve; those of a model that knows no speakers are the same at all."""
    return draws.get(point, draws["0"])


def product(each: Sequence[np.ndarray]) -> np.ndarray:
    """The normalised geometric mean of (N, K) probabilities."""
    mean_NK = np.exp(np.mean([np.log(np.maximum(one, 1e-12)) for one in each], axis=0))
    return mean_NK / mean_NK.sum(1, keepdims=True)


class Answers:
    """The answers of a model, or of a set of them, for one split of all folds."""

    def __init__(self, place: Place, ways: Sequence[Way], split: str, files: str = "scored") -> None:
        self.place, self.ways, self.split = place, ways, split
        corpus = ways[0].corpus
        self.tasks = [models.task(place, corpus, fold) for fold in range(CORPORA[corpus].folds)]

    def draws(self, fold: int, point: str) -> list[np.ndarray]:
        """The normalised product of the members' probabilities, in every draw."""
        each = [probabilities(models.scored(self.place, way, fold, self.split), point) for way in self.ways]
        number = max(map(len, each))
        logs = [
            sum(np.log(np.maximum(own[draw % len(own)], 1e-12)) for own in each) / len(each) for draw in range(number)
        ]
        return [np.exp(log) / np.exp(log).sum(1, keepdims=True) for log in logs]

    @cache  # noqa: B019 - few, and alive to the end
    def at(self, point: str) -> list[Predictions]:
        """The predictions of every draw, over all folds."""
        folds = [
            [models.predictions(own, self.split, found) for found in self.draws(fold, point)]
            for fold, own in enumerate(self.tasks)
        ]
        return [pooled(parts) for parts in zip(*folds, strict=True)]

    def uar(self, point: str) -> float:
        """The mean over the draws."""
        return float(np.mean([of(one) for one in self.at(point)]))

    def rows(self) -> list[dict[str, Any]]:
        """The project's own curve."""
        points = [Enrolled(n, tuple(self.at(str(n))), 0.0) for n in SETTINGS.recordings]
        return curve([points])


def of(predictions: Predictions) -> float:
    """UAR."""
    return float(uar(confusion(predictions.labels, predictions.predicted, len(predictions.emotions))))


def tried_uars(place: Place, way: Way) -> list[float]:
    """Dev UAR of the probe at each point of `CHOOSING`, over all folds together."""
    corpus, found = CORPORA[way.corpus], []
    own = [models.task(place, way.corpus, fold) for fold in range(corpus.folds)]
    folds = [models.tried(place, way, fold, CHOOSING, SHRINKAGES) for fold in range(corpus.folds)]
    for point in map(str, CHOOSING):
        every = [probabilities(draws, point) for draws in folds]
        per_draw = [
            of(pooled([models.predictions(one, "dev", part) for one, part in zip(own, parts, strict=True)]))
            for parts in zip(*every, strict=True)
        ]
        found.append(float(np.mean(per_draw)))
    return found


def chosen(place: Place, corpus: str) -> list[Way]:
    """Of every backbone, kind of layers and `head.speaker` the candidate that is best for dev."""
    best: dict[tuple[str, str, str], tuple[float, Way]] = {}
    for way in candidates(corpus):
        if not models.all_tried(place, way, SHRINKAGES):
            continue
        value, key = float(np.mean(tried_uars(place, way))), (way.backbone, way.layers, way.speaker)
        if key not in best or value > best[key][0] + 1e-9:
            best[key] = value, way
    return [way for _, way in best.values()]


def grown(place: Place, ways: Sequence[Way], points: Sequence[str]) -> list[list[Way]]:
    """Sets of 1, 2, ... models: each adds the one that makes dev's mean UAR at ``points`` the highest."""
    sets: list[list[Way]] = [[]]
    while len(sets) <= min(LARGEST, len(ways)):
        left = [way for way in ways if way not in sets[-1]]

        def value(way: Way, before: list[Way] = sets[-1]) -> float:
            answers = Answers(place, [*before, way], "dev")
            return float(np.mean([answers.uar(point) for point in points]))

        sets.append([*sets[-1], max(left, key=value)])
    return sets[1:]


# -- the page


def cell(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]["uar"]
    return f"{row['uar']:.3f} [{low:.3f}, {high:.3f}]"


def figures(named: Mapping[str, Answers]) -> Iterator[str]:
    """The table of UAR by number of recordings."""
    yield "| | " + " | ".join("k = 0" if point == "0" else point for point in POINTS) + " |"
    yield "|---" * (len(POINTS) + 1) + "|"
    for name, answers in named.items():
        rows = answers.rows()
        knows = any(way.speaker != "none" for way in answers.ways)
        yield (
            f"| {name} | "
            + " | ".join(cell(row) for row in (rows if knows else rows[:1]))
            + " |"
            + ("" if knows else " |" * (len(POINTS) - 1))
        )


def gap_lines(pairs: Iterable[tuple[str, tuple[Answers, str], tuple[Answers, str]]]) -> Iterator[str]:
    """Differences on the same utterances, all draws together, tested over speakers."""
    listed = list(pairs)
    records = []
    for _, (one, at), (other, there) in listed:
        first, second = one.at(at), other.at(there)
        number = max(len(first), len(second))
        joined, against = (pooled([own[n % len(own)] for n in range(number)]) for own in (first, second))
        assert joined.utterance_ids == against.utterance_ids
        told = joined.labels, joined.predicted, against.predicted, joined.speakers, len(joined.emotions)
        records.append(gap_records(*told))
    yield "| | points of UAR | p | corrected |\n|---|---|---|---|"
    for (name, *_), record in zip(listed, corrected(records), strict=True):
        gap = record["uar"]
        low, high = gap["ci95"] or (float("nan"), float("nan"))
        p = " | ".join("" if gap[key] is None else f"{gap[key]:.3f}" for key in ("p", "p_holm"))
        yield f"| {name} | {100 * gap['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {p} |"


def epochs_of(place: Place, way: Way) -> str:
    """How often each epoch was the best on dev."""
    found = []
    for fold in range(CORPORA[way.corpus].folds):
        with safe_open(way.file(place.scratch, "heads", fold, "safetensors"), "np") as file:
            found.append(file.metadata()["best_epoch"])
    return " ".join(found)


def openings(place: Place) -> str:
    """How often test was answered, by corpus."""
    lines = [json.loads(line) for line in (place.scratch / "openings.jsonl").read_text().splitlines()]
    counted: dict[str, dict[tuple[Any, ...], int]] = {}
    for line in [line for line in lines if "way" in line]:
        own = counted.setdefault(line["way"][0], {})
        own[(*line["way"], line["fold"])] = own.get((*line["way"], line["fold"]), 0) + 1
    told = [
        f"{CORPORA[name].name}: {len({key[:-1] for key in own})} models, at most {max(own.values())} time(s) each fold"
        for name, own in counted.items()
    ]
    return f"{'; '.join(told)}; with skewed enrolment: one model, {sum('skew' in line for line in lines)} time(s)"


def section(place: Place, corpus: str) -> tuple[list[str], dict[str, Answers]]:
    """One corpus: lines, and the answers that the picture shows; empty if no model has been measured."""
    ways = [way for way in chosen(place, corpus) if models.all_scored(place, way)]
    if not ways:
        return [], {}
    known, fresh = [grown(place, ways, points) for points in (POINTS, ("0",))]
    test = {str(way): Answers(place, [way], "test") for way in ways}
    best, name = test[str(known[0][0])], f"the best single model for dev ({known[0][0]})"
    sets = {f"set of {len(own)}": Answers(place, own, "test") for own in known[1:]}
    at_zero = {f"set of {len(own)}, chosen for k = 0": Answers(place, own, "test") for own in fresh[1:]}
    pairs = [(f"{name}: k = {k} over k = 0", (best, k), (best, "0")) for k in POINTS[1:]]
    shown = {"one model": best}
    for title, largest in list(sets.items())[-1:]:
        pairs += [(f"{title} over {name}, k = {k}", (largest, k), (best, k)) for k in ("0", "8", OTHERS)]
        shown[title] = largest
    pairs += [(f"{title}, over {name}", (own, "0"), (best, "0")) for title, own in list(at_zero.items())[-1:]]
    lines = [*figures(test | sets | at_zero), "", "Members of the sets, in the order in which dev added them:", ""]
    lines += [f"{n}. {way}" for n, way in enumerate(known[-1], start=1)]
    lines += ["", f"Of those for k = 0: {'; '.join(map(str, fresh[-1]))}.", "", *gap_lines(pairs), ""]
    lines += ["What dev chose, dev's UAR of the probe, and the best epoch of each fold (0: the probe):", ""]
    lines += ["| | k = 0 | 8 | others | epochs |", "|---|---|---|---|---|"]
    for way in ways:
        values = " | ".join(f"{value:.3f}" for value in tried_uars(place, way))
        lines.append(f"| {way} | {values} | {epochs_of(place, way)} |")
    return lines, shown


SKEW: Final = """\
## When what is enrolled is not like what is answered

RAVDESS, {way}, trained as above; the same utterances are answered in every row, with k recordings enrolled out of those
that the row names (of neutral a speaker has four), mean of {draws} draws. The shrinkage that a row asks for is that of
{shrinkages} with the best dev UAR at k = 4 and 8 together. Points of UAR over the same model without recordings.
"""
DISTANCE: Final = """\
### Another person by mistake

The distance of recordings to a voice (`SpeakerNorm.distance`), the mean over those answered, {rounds} draws for each
test speaker, the other person one of the same fold. The limits are those of `ser-ray enrol` and `predict --voice`.
"""


GRADIENT: Final = """\
## The gradient through the mean

{epochs} epochs of LoRA (rank 8, lr {rate:g}) in the last block of whisper-tiny.en on the first of EmoBox's folds, from
the probe of that block; dev UAR (four speakers) by the number of recordings, mean of {seeds} seeds. A step computes the
vectors that voices are made of with its own weights; the two ways differ in whether the gradient flows through them.
"""


def skew_way(place: Place) -> Way:
    """The model that skewed enrolment is measured with."""
    return next(way for way in chosen(place, "ravdess") if way[1:4] == (BACKBONES[1], "concat", "center"))


def skewed(place: Place) -> list[str]:
    """The section of what is enrolled by mistake, for the best model of the smaller encoder."""
    way = skew_way(place)
    if not skew.is_made(place, way):
        return []
    limits = {1: FAR, SEVERAL: FAR_TOGETHER}
    shrinkages = ", ".join(f"{s:g}" for s in skew.SHRINKAGES)
    return [
        SKEW.format(way=way, draws=skew.DRAWS, shrinkages=shrinkages),
        *skew.lines(place, way),
        "",
        DISTANCE.format(rounds=skew.ROUNDS),
        *skew.distance_lines(place, way, limits),
        "",
    ]


def of_gradient(place: Place) -> list[str]:
    """The section of the gradient, of the seeds that are there."""
    told = gradient.found(place)
    about = {"epochs": gradient.EPOCHS, "rate": gradient.RATE, "seeds": min(map(len, told.values()), default=0)}
    return [GRADIENT.format(**about), *gradient.lines(told), ""] if about["seeds"] else []


def page(place: Place) -> None:
    """Print it, and draw the picture."""
    print(PAGE.format(epochs=models.EPOCHS, draws=SETTINGS.draws))
    shown: dict[str, list[dict[str, Any]]] = {}
    for corpus, about in CORPORA.items():
        lines, answers = section(place, corpus)
        if not lines:
            continue
        print(f"## {about.name}\n\n{about.about}\n")
        print("\n".join(lines) + "\n")
        shown |= {f"{about.name}, {name}": own.rows() for name, own in answers.items()}
        if lacking := [way for way in chosen(place, corpus) if not models.all_scored(place, way)]:
            print(f"Not measured yet: {'; '.join(map(str, lacking))}.\n")
    for make in (skewed, of_gradient):
        print("\n".join(make(place)))
    print(f"How often test was answered: {openings(place)}.")
    PICTURE.write_bytes(plots.to_png(plots.plot_enrolment(shown, "uar")))


def run_all(place: Place) -> None:
    """All that is missing, what the page needs most first."""
    for corpus, backbone, kind in ORDER:
        folds = range(CORPORA[corpus].folds)
        wanted = [way for way in candidates(corpus) if way[1:4] == (backbone, *kind)]
        for way, fold in itertools.product(wanted, folds):
            models.tried(place, way, fold, CHOOSING, SHRINKAGES)
        ways = [way for way in chosen(place, corpus) if way[1:4] == (backbone, *kind)]
        models.say(f"chosen: {'; '.join(map(str, ways))}")
        for way, fold, split in itertools.product(ways, folds, ("dev", "test")):
            models.scored(place, way, fold, split)
    for split in ("dev", "test"):
        skew.made(place, skew_way(place), split)
    for seed, through in itertools.product(range(gradient.SEEDS), (False, True)):
        gradient.made(place, seed, through)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("ravdess", "emodb", "tiny", "base", "scratch"):
        parser.add_argument(name, type=lambda given: Path(given).resolve())
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    backbones = tuple(zip(BACKBONES, (given.base, given.tiny), strict=True))
    place = Place((("ravdess", given.ravdess), ("emodb", given.emodb)), backbones, given.scratch)
    if not given.page:
        run_all(place)
    page(place)


if __name__ == "__main__":
    main()
