"""More than one model: which of the finalists' runs answer together, chosen on dev alone.

Members are combined by the product of their calibrated probabilities: the weighted mean of their logarithms,
normalised. They are chosen by greedy forward selection with replacement (Caruana et al. 2004, "Ensemble selection from
libraries of models", ICML): begin with the best one, then add again and again the one that makes the ensemble best on
dev, whether it is in it already or not. How often one was added is its weight.

**Who may be combined.** A run of another fold, or with another dev, was trained on utterances that are dev or test
here: on these it would be right by memory. So only runs of one split are combined. A candidate is a configuration with
a seed, over all folds: in each fold its run of that fold answers. One choice, with one set of weights, is made for all
folds together, as the one of a single configuration is. With `Tune.rotate_dev` each seed has a dev of its own; then a
candidate is a configuration, and only runs of the same fold and seed are combined.

**Whether it is used.** The ensemble is chosen among so many that its metric on the dev that chose it is too high. So
the choice is made again without a part of the dev speakers, and that part is answered by what the others chose, for
each part. Only if this metric is above that of the best single model (which dev chose too, so that its own is rather
too high), the ensemble is the chosen model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from scipy.special import log_softmax, logsumexp

from ser_ray.evaluation.calibration import fit_temperature
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.metrics import confusion, headline
from ser_ray.evaluation.predictions import Predictions, pooled
from ser_ray.evaluation.results import JOIN
from ser_ray.evaluation.runs import Run

NAME: Final = "ensemble"
"""In place of the id of a trial."""
PARTS: Final = 5
"""Parts of the dev speakers for the second choice."""
SMALLEST: Final = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Candidate:
    """A model that may be a member: one run in each split, in the order of the splits."""

    runs: tuple[Run, ...]
    dev: tuple[Predictions, ...]
    """As its logits are."""
    temperature: float
    """Fitted to all of its dev predictions."""

    def calibrated(self) -> list[Predictions]:
        """Its dev predictions at its temperature."""
        return [part.at_temperature(self.temperature) for part in self.dev]


@dataclass(frozen=True)
class Member:
    """A candidate that was chosen; the weights of an ensemble sum to 1."""

    candidate: Candidate
    weight: float

    def as_json(self) -> dict[str, Any]:
        """How it is named in records."""
        run = self.candidate.runs[0]
        about = {"trial_id": run.trial_id, "seed": run.seed, "soup": run.soup, "checkpoint": run.checkpoint}
        return about | {"weight": self.weight, "temperature": self.candidate.temperature}


@dataclass(frozen=True)
class Chosen:
    """The model that dev chose: that of a trial, or an ensemble."""

    name: str
    """The id of the trial, or `NAME`."""
    members: tuple[Member, ...]
    """Of a trial its one model, with the runs of all folds and seeds."""
    single: tuple[Run, ...]
    """The runs of the best single model, in each fold that of its first seed: beside these an ensemble is tested."""

    @property
    def needed(self) -> list[Run]:
        """The runs that it is tested by, each once."""
        own = [run for member in self.members for run in member.candidate.runs]
        return list(dict.fromkeys([*own, *self.single] if self.name == NAME else own))


def trial(runs: Sequence[Run], dev: Sequence[Predictions]) -> Chosen:
    """The model of a trial, without an ensemble."""
    first_seed = {fold: next(run for run in runs if run.fold == fold) for fold in sorted({run.fold for run in runs})}
    member = Member(Candidate(tuple(runs), tuple(dev), 1.0), 1.0)
    return Chosen(runs[0].trial_id, (member,), tuple(first_seed.values()))


def candidates_of(runs: Mapping[str, Sequence[Run]], dev: Mapping[Run, Predictions], rotated: bool) -> list[Candidate]:
    """The candidates among the runs of every finalist, in their order; the first split is that of the first run."""
    (first, *_), *_ = runs.values()
    grouped: dict[Any, list[Run]] = {}
    for trial_id, own in runs.items():
        for run in own:
            grouped.setdefault((trial_id, () if rotated else (run.seed, run.soup)), []).append(run)
    found = []
    for own in grouped.values():
        ordered = sorted(own, key=lambda run: (run.fold != first.fold, run.fold, run.seed))
        parts = tuple(dev[run] for run in ordered)
        found.append(Candidate(tuple(ordered), parts, fit_temperature(pooled(parts))))
    splits = [[(run.fold, run.seed if rotated else 0) for run in one.runs] for one in found]
    assert all(one == splits[0] for one in splits), "every candidate has a run in every split"
    return found


def combined(parts: Sequence[Predictions], weights: Sequence[float]) -> Predictions:
    """The product of the members' probabilities of the same utterances, each to the power of its weight, normalised;
    of one member alone, its own.

    >>> one = Predictions(("a", "b"), ("u",), ("c",), ("s",), np.array([0]), np.array([[0.8, 0.2]]))
    >>> other = replace(one, probabilities=np.array([[0.5, 0.5]]))
    >>> combined([one, other], [0.5, 0.5]).probabilities.round(3).tolist()
    [[0.667, 0.333]]
    """
    assert len({part.utterance_ids for part in parts}) == len({part.emotions for part in parts}) == 1
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], probabilities=product([part.probabilities for part in parts], weights))


def product(probabilities: Sequence[np.ndarray], weights: Sequence[float], temperature: float = 1.0) -> np.ndarray:
    """(N, K): the same of plain arrays, at a temperature of its own."""
    logs = sum(w * np.log(np.maximum(part, SMALLEST)) for part, w in zip(probabilities, weights, strict=True))
    return np.asarray(np.exp(log_softmax(logs / temperature, axis=1)))


def answers(members: Sequence[Member], by_run: Mapping[Run, Predictions], only: int | None = None) -> list[Predictions]:
    """The predictions of an ensemble in each split, before its own temperature; ``by_run``: those of its members' runs,
    as their logits are. ``only``: the number of the one split to answer."""
    splits = list(zip(*(member.candidate.runs for member in members), strict=True))
    splits = splits if only is None else [splits[only]]
    if len(members) == 1:
        return [by_run[run] for (run,) in splits]
    weights = [member.weight for member in members]
    temperatures = [member.candidate.temperature for member in members]
    return [
        combined([by_run[run].at_temperature(t) for run, t in zip(own, temperatures, strict=True)], weights)
        for own in splits
    ]


def enrolled_answers(
    members: Sequence[Member],
    by_run: Mapping[Run, Sequence[Enrolled]],
    plain: Mapping[Run, Predictions],
) -> list[list[Enrolled]]:
    """`answers` with recordings of each speaker known, for each split a curve. ``by_run``: that of each run that uses
    what is known; ``plain``: the predictions of all."""
    curves = []
    for split in range(len(members[0].candidate.runs)):
        runs = [member.candidate.runs[split] for member in members]
        first = next(by_run[run] for run in runs if run in by_run)
        points = []
        for number, point in enumerate(first):
            draws = []
            for draw in range(len(point.draws)):
                own = {run: by_run[run][number].draws[draw] if run in by_run else plain[run] for run in runs}
                draws += answers(members, own, split)
            points.append(replace(point, draws=tuple(draws)))
        curves.append(points)
    return curves


def total(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several models cost together, one after the other on the same machine."""
    summed = {name: sum(cost[name] for cost in costs) for name in ("parameters", "megabytes", "milliseconds")}
    return {**costs[0], **summed}


def sentences(record: Mapping[str, Any], title: str) -> list[str]:
    """What ``ensemble.json`` says, in sentences; ``title``: of the metric."""
    if not record:
        return []
    found, members = record["dev"], record["members"]
    single = f"{found['single']:.3f} with the best single model, trial {record['single']}"
    if not record["used"]:
        again = "cannot be measured" if found["held_out"] is None else f"is {found['held_out']:.3f}"
        return [f"No ensemble is used: its dev {title} on speakers that did not choose it {again}; it is {single}."]
    named = "; ".join(f"{_run(member)}, weight {member['weight']:.2f}" for member in members)
    what = f"an ensemble of {len(members)} models, the product of their calibrated probabilities ({named})"
    lines = [
        f"best/ is {what if len(members) > 1 else _run(members[0])}.",
        f"Chosen among {record['candidates']} models by dev: {title} {found['held_out']:.3f} on dev speakers that did "
        f"not choose it, {single} ({found['ensemble']:.3f} on all of dev, which chose it and is too high).",
    ]
    if costs := record.get("costs"):
        own, alone = (_cost(costs[name]) for name in ("ensemble", "single"))
        seconds, device = costs["single"]["seconds"], costs["single"]["device"]
        lines.append(f"It has {own} for an utterance of {seconds:.1f} s ({device}); the best single model {alone}.")
    return lines


def runs_of(members: Sequence[Member]) -> list[Run]:
    """The ensemble as a run in each split; its checkpoint names those of all members with their weights."""
    if len(members) == 1:
        return list(members[0].candidate.runs)
    return [
        Run(
            NAME,
            own[0].fold,
            own[0].seed,
            JOIN.join(f"{m.weight:.4g} x {run.checkpoint}" for m, run in zip(members, own, strict=True)),
        )
        for own in zip(*(member.candidate.runs for member in members), strict=True)
    ]


def select(candidates: Sequence[Candidate], rounds: int, metric: str) -> list[Member]:
    """The ensemble that is best on dev, by greedy forward selection in so many rounds: the one of the round with the
    highest metric, the mean over the splits; of equal ones the earliest. Candidates that are equal by the metric are
    compared by the likelihood of dev, and then by their order."""
    counts = _select(_material(candidates), rounds, metric)
    return [Member(candidates[c], float(counts[c] / counts.sum())) for c in map(int, np.flatnonzero(counts))]


def held_out(candidates: Sequence[Candidate], rounds: int, metric: str) -> tuple[list[Predictions], float] | None:
    """Dev answered by ensembles that its speakers had no part in choosing, and the metric, the mean over the splits.
    None if there is one speaker only. (The temperatures, one number a candidate, are those of all of dev.)"""
    material = _material(candidates)
    speakers = sorted({speaker for part in candidates[0].dev for speaker in part.speakers})
    if len(speakers) < 2:
        return None
    of_part = {speaker: n % min(PARTS, len(speakers)) for n, speaker in enumerate(speakers)}
    assigned = [np.array([of_part[speaker] for speaker in part.speakers]) for part in candidates[0].dev]
    found = [np.empty(logs.shape[1:]) for logs, _ in material]
    for number in sorted(set(of_part.values())):
        others = [_rows(split, own != number) for split, own in zip(material, assigned, strict=True)]
        counts = _select([split for split in others if len(split[1])], rounds, metric)
        for (logs, _), own, answer in zip(material, assigned, found, strict=True):
            mixed = np.tensordot(counts / counts.sum(), logs[:, own == number], axes=1)
            answer[own == number] = np.exp(log_softmax(mixed, axis=1))
    parts = [replace(p, probabilities=answer) for p, answer in zip(candidates[0].dev, found, strict=True)]
    return parts, mean_metric(parts, metric)


def mean_metric(parts: Sequence[Predictions], metric: str) -> float:
    """A headline metric, the mean over parts."""
    return float(np.mean([_metric(part.labels, part.predicted, len(part.emotions), metric) for part in parts]))


# -- below: how it is done

Material = list[tuple[np.ndarray, np.ndarray]]
"""Of each split the logarithms of all candidates' probabilities (C, N, K), and the labels (N,)."""


def _run(member: Mapping[str, Any]) -> str:
    return str(Run(member["trial_id"], 0, member["seed"], "", member["soup"]))


def _cost(cost: Mapping[str, Any]) -> str:
    millions = cost["parameters"] / 1e6
    return f"{millions:.1f} M parameters, {cost['megabytes']:.0f} MB and {cost['milliseconds']:.0f} ms"


def _material(candidates: Sequence[Candidate]) -> Material:
    every = [candidate.calibrated() for candidate in candidates]
    return [(np.stack([_logarithms(part) for part in own]), own[0].labels) for own in zip(*every, strict=True)]


def _logarithms(predictions: Predictions) -> np.ndarray:
    return np.log(np.maximum(predictions.probabilities, SMALLEST))


def _rows(split: tuple[np.ndarray, np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logs, labels = split
    return logs[:, mask], labels[mask]


def _select(material: Material, rounds: int, metric: str) -> np.ndarray:
    """(C,): how often each candidate is chosen."""
    counts = np.zeros(len(material[0][0]))
    best, best_counts = -np.inf, counts
    totals = [np.zeros(logs.shape[1:]) for logs, _ in material]
    for number in range(1, rounds + 1):
        scores = []
        for candidate in range(len(counts)):
            mixed = [(total + logs[candidate]) / number for total, (logs, _) in zip(totals, material, strict=True)]
            scores.append(_score(mixed, [labels for _, labels in material], metric))
        winner = max(range(len(scores)), key=scores.__getitem__)  # the first of equal ones
        totals = [total + logs[winner] for total, (logs, _) in zip(totals, material, strict=True)]
        counts = counts + (np.arange(len(counts)) == winner)
        if scores[winner][0] > best:
            best, best_counts = scores[winner][0], counts
    return best_counts


def _score(mixed: Sequence[np.ndarray], labels: Sequence[np.ndarray], metric: str) -> tuple[float, float]:
    """The metric, and minus the negative log-likelihood; each the mean over the splits."""
    pairs = list(zip(mixed, labels, strict=True))
    metrics = [_metric(own, logs.argmax(axis=1), logs.shape[1], metric) for logs, own in pairs]
    likelihoods = [(logs[np.arange(len(own)), own] - logsumexp(logs, axis=1)).mean() for logs, own in pairs]
    return round(float(np.mean(metrics)), 12), float(np.mean(likelihoods))


def _metric(labels: np.ndarray, predicted: np.ndarray, num_emotions: int, metric: str) -> float:
    return float(headline(confusion(labels, predicted, num_emotions))[metric])
