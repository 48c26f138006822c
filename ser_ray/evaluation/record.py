"""What an evaluation writes down: the choice on dev, the test metrics of the chosen one, and each opening of test."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ser_ray import config, disk
from ser_ray.config import SearchSpace
from ser_ray.evaluation import baselines, calibration, enrolment, ensemble, layout, published
from ser_ray.evaluation.calibration import Calibration
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.ensemble import Chosen
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.predictions import Predictions, pooled
from ser_ray.evaluation.runs import Run
from ser_ray.evaluation.summary import summarise, write_predictions
from ser_ray.protocols.task import Task


@dataclass(frozen=True)
class Record:
    """Writes the records of the choice and of the test."""

    directory: Path
    space: SearchSpace
    task: Task
    dev: Mapping[str, list[Predictions]]
    """Dev predictions of every finalist, one entry per run."""
    runs: Mapping[str, list[Run]]

    def choose(self, finalists: Sequence[TrialRecord]) -> str:
        """The best on dev; ties go to the one with fewer trainable parameters. Writes ``choice.json``."""
        metric = self.space.tune.metric.removeprefix("dev_")
        means = {i: _mean([self._summary(p) for p in own]) for i, own in self.dev.items()}
        sizes = {finalist.trial_id: int(finalist.best["trainable_parameters"]) for finalist in finalists}
        ranked = sorted(means, key=lambda i: (-round(means[i][metric], 12), sizes[i], i))
        chosen: str = ranked[0]
        among = f"{len(ranked)} finalists"
        over = f", mean of {len(self.runs[chosen])} runs," if len(self.runs[chosen]) > 1 else ""
        rows = [
            {"trial_id": i, "checkpoint": self.runs[i][0].checkpoint, "trainable_parameters": sizes[i]}
            | {f"dev_{name}": means[i][name] for name in HEADLINE}
            | {"runs": [self._run(run, p) for run, p in zip(self.runs[i], self.dev[i], strict=True)]}
            for i in ranked
        ]
        against = None
        if len(ranked) > 1:
            gap = _gap(pooled(self.dev[chosen]), pooled(self.dev[ranked[1]]))
            against = gap and {"trial_id": ranked[1], "gap": corrected([gap])[0]}
        why = f"highest dev {metric}{over} of {among}; ties go to the one with fewer trainable parameters"
        choice = {"trial_id": chosen, "why": why, "metric": self.space.tune.metric, "finalists": rows}
        disk.write_json(self.directory / "evaluation" / "choice.json", choice | {"against": against})
        return chosen

    def with_ensemble(
        self, single: Chosen, soups: Mapping[str, Sequence[Run]], dev: Mapping[Run, Predictions]
    ) -> tuple[Record, Chosen]:
        """The record with the ensemble that dev chooses among all runs and ``soups`` (by finalist), and that ensemble;
        without it, and ``single``, if it is no better. Writes ``ensemble.json``."""
        metric, rounds = self.space.tune.metric.removeprefix("dev_"), self.space.tune.ensemble
        best_first = {single.name: self.runs[single.name]} | dict(self.runs)
        runs = {i: [*own, *soups.get(i, ())] for i, own in best_first.items()}
        candidates = ensemble.candidates_of(runs, dev, self.space.tune.rotate_dev)
        members = ensemble.select(candidates, rounds, metric)
        again = ensemble.held_out(candidates, rounds, metric)
        parts, alone = ensemble.answers(members, dev), candidates[0]
        reached = ensemble.mean_metric(self.dev[single.name], metric)
        other = [member.candidate for member in members] != [alone]
        used = other and again is not None and again[1] > reached
        found = {"ensemble": ensemble.mean_metric(parts, metric), "held_out": again and again[1], "single": reached}
        content = {
            "used": used,
            "candidates": len(candidates),
            "members": [member.as_json() for member in members],
            "single": single.name,
            "metric": metric,
            "dev": found,
            "against": again and _gap(pooled(again[0]), pooled(alone.dev)),
        }
        disk.write_json(self.directory / "evaluation" / layout.ENSEMBLE, content)
        if not used:
            return self, single
        runs_of = {**self.runs, ensemble.NAME: ensemble.runs_of(members)}
        grown = replace(self, dev={**self.dev, ensemble.NAME: parts}, runs=runs_of)
        return grown, Chosen(ensemble.NAME, tuple(members), single.single)

    def calibration(self, chosen: str, answer: Mapping[str, Any] | None = None) -> Calibration:
        """The calibration of the chosen model by dev, over all its runs. ``answer``: its test metrics, if they are
        known; those of an older version are of a model that was not calibrated, and it stays so."""
        if answer is not None and not (self.directory / "evaluation" / calibration.FILE).is_file():
            return Calibration()
        return calibration.fitted(pooled(self.dev[chosen]))

    def write_costs(self, costs: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to ``ensemble.json`` what the ensemble and the single model cost at prediction."""
        path = self.directory / "evaluation" / layout.ENSEMBLE
        disk.write_json(path, disk.read_json(path) | {"costs": costs})

    def write_dev(self, chosen: str, calibrated: Calibration) -> dict[str, Any]:
        """Write ``dev.json`` and the dev predictions of the chosen model; returns the metrics, over all its runs."""
        whole = pooled(self.dev[chosen]).at_temperature(calibrated.temperature)
        metrics = self._summary(whole)
        disk.write_json(self.directory / "evaluation" / "dev.json", metrics)
        write_predictions(whole, "dev", self.directory / "evaluation" / "predictions.parquet")
        return metrics

    def known(self, chosen: str) -> dict[str, Any] | None:
        """The test metrics of the same models, if the test set was opened for them before."""
        path = self.directory / "evaluation" / "test.json"
        before: dict[str, Any] = disk.read_json(path) if path.is_file() else {}
        same = [run["checkpoint"] for run in before.get("runs", [])] == [run.checkpoint for run in self.runs[chosen]]
        return before if before and same else None

    def test(
        self,
        chosen: str,
        parts: list[Predictions],
        by_baseline: Mapping[str, list[Predictions]],
        calibrated: Calibration,
    ) -> dict[str, Any]:
        """The test metrics, with baselines; ``parts``: test predictions of each run, ``by_baseline``: those of other
        models by fold, as their logits are. Writes ``calibration.json`` and the test predictions."""
        about = {"trial_id": chosen, "checkpoints": [run.checkpoint for run in self.runs[chosen]]}
        measured = calibration.record_of(calibrated, self.dev[chosen], parts)
        disk.write_json(self.directory / "evaluation" / calibration.FILE, about | measured)
        parts = [part.at_temperature(calibrated.temperature) for part in parts]
        whole = pooled(parts)
        answer = self._summary(whole)
        answer["runs"] = [self._run(run, p, "") for run, p in zip(self.runs[chosen], parts, strict=True)]
        if len(parts) > 1:
            answer["mean"] = _mean([self._summary(p) for p in parts])
        if len(parts) > len({run.fold for run in self.runs[chosen]}):
            answer["seeds_averaged"] = self._ensemble(self.runs[chosen], parts)
        others = {name: pooled(by_fold) for name, by_fold in by_baseline.items()}
        answer["baselines"] = _simple_baselines(self.task, whole)
        answer["baselines"] |= {name: _brief(self._summary(predictions)) for name, predictions in others.items()}
        own = pooled(_averaged_by_fold(self.runs[chosen], parts))
        tested = {name: _gap(own, predictions) for name, predictions in others.items()}
        gaps = {name: gap for name, gap in tested.items() if gap}
        answer["against"] = dict(zip(gaps, corrected(gaps.values()), strict=True))
        answer |= self._seen_by_the_choice(whole)
        experiment = self.space.experiment
        # What was published is of all utterances.
        answer["published"] = (
            []
            if experiment.exclude
            else published.matching(experiment.corpora, experiment.protocol.split(), whole.emotions, answer["leaky"])
        )
        write_predictions(whole, "test", self.directory / "evaluation" / "predictions.parquet")
        return answer

    def enrolment(self, chosen: str, by_split: Mapping[str, Sequence[Sequence[Enrolled]]]) -> None:
        """Write what recordings of a speaker without labels are worth to the chosen model; ``by_split``: for dev and
        test one entry per run, none if it does not use them: the file of an earlier choice is then removed."""
        path = self.directory / "evaluation" / enrolment.FILE
        if not by_split:
            path.unlink(missing_ok=True)
            return
        settings = config.to_dict(self.space.experiment.protocol.enrolment)
        runs = [run.checkpoint for run in self.runs[chosen]]
        curves = {split: enrolment.curve(own) for split, own in by_split.items()}
        disk.write_json(path, {"trial_id": chosen, "checkpoints": runs, "settings": settings} | curves)

    def _seen_by_the_choice(self, test: Predictions) -> dict[str, int]:
        """How many utterances are tested, and how many of them were dev in another run and so influenced the choice."""
        dev = set(self.task.labels("dev"))  # of the search itself
        dev |= {i for parts in self.dev.values() for part in parts for i in part.utterance_ids}
        tested = set(test.utterance_ids)
        return {"tested": len(tested), "tested_in_dev": len(tested & dev)}

    def _ensemble(self, runs: Sequence[Run], parts: Sequence[Predictions]) -> dict[str, Any]:
        """Metrics of the mean of the seeds' probabilities: of all folds' utterances, and the mean over folds."""
        averaged = _averaged_by_fold(runs, parts)
        metrics = _brief(self._summary(pooled(averaged)))
        return metrics | {"mean": _mean([self._summary(p) for p in averaged])}

    def _summary(self, predictions: Predictions) -> dict[str, Any]:
        protocol = self.space.experiment.protocol.split() | {"description": self._description()}
        leaky = self.task.fold.leaky or disk.read_json(self.directory / "audit.json")["leaky"]
        return summarise(predictions, protocol, leaky)

    def _description(self) -> str:
        runs = next(iter(self.runs.values()))
        folds = sorted({run.fold for run in runs})
        if len(runs) == 1:
            return self.task.fold.description
        named = ", ".join(map(str, folds))
        return f"{self.space.experiment.protocol.scheme}, folds {named}; {len(runs)} runs of each finalist"

    def _run(self, run: Run, predictions: Predictions, prefix: str = "dev_") -> dict[str, Any]:
        metrics = self._summary(predictions)
        named = {f"{prefix}{name}": metrics[name] for name in HEADLINE}
        return {"fold": run.fold, "seed": run.seed, "checkpoint": run.checkpoint, "n": metrics["n"]} | named


def record_opening(directory: Path, trial_id: str, argv: list[str]) -> None:
    """Called before the test set is predicted, so that no opening goes unrecorded."""
    path = directory / "evaluation" / "test_openings.json"
    openings = disk.read_json(path) if path.is_file() else []
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    disk.write_json(path, [*openings, {"when": when, "trial_id": trial_id, "argv": argv}])


# -- below: how it is done


def _averaged_by_fold(runs: Sequence[Run], parts: Sequence[Predictions]) -> list[Predictions]:
    """For every fold the mean of its seeds' probabilities."""
    averaged = []
    for fold in sorted({run.fold for run in runs}):
        own = [part for run, part in zip(runs, parts, strict=True) if run.fold == fold]
        assert len({part.utterance_ids for part in own}) == 1, "one order for all seeds"
        averaged.append(replace(own[0], probabilities=np.mean([part.probabilities for part in own], axis=0)))
    return averaged


def _gap(one: Predictions, other: Predictions) -> dict[str, Any] | None:
    """The gap of one to another on the same utterances; None for a single speaker, as it is tested over speakers."""
    if len(set(one.speakers)) < 2:
        return None
    assert one.utterance_ids == other.utterance_ids, "both of the same utterances"
    return gap_records(one.labels, one.predicted, other.predicted, one.speakers, len(one.emotions))


def _mean(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in metrics])) for name in HEADLINE}


def _brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in (*HEADLINE, "ci95", "ci95_unit")}


def _simple_baselines(task: Task, test: Predictions) -> dict[str, Any]:
    train = np.array([test.emotions.index(task.emotions[label]) for label in task.rows("train")["label"].to_pylist()])
    num_emotions = len(test.emotions)
    return {
        "chance": baselines.chance(num_emotions),
        "majority": baselines.majority(train, test.labels, num_emotions),
    }
