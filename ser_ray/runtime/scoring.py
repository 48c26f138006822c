"""What an evaluation asks of its actors: the predictions of checkpoints and baselines, and those for known speakers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from ser_ray import config
from ser_ray.config import Adapter, Experiment, Head, SearchSpace
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.runs import Run
from ser_ray.runtime import feature_cache, plan
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.feature_cache import CachedFeatures
from ser_ray.runtime.pool import Pool

PROBE: Final = "frozen backbone + linear"
EGEMAPS: Final = "eGeMAPS + linear SVM"


@dataclass(frozen=True)
class Scoring:
    """Predictions of a results folder's models, by actors of `ser_ray.runtime.scorer` in parallel."""

    directory: Path
    space: SearchSpace
    shard_dirs: list[str]
    allocation: Allocation
    pool: Pool
    console: Console

    def dev(self, runs: Mapping[str, Sequence[Run]], experiments: Mapping[str, Experiment]) -> dict[Run, Predictions]:
        """The dev predictions of every run, from cached features where they are; both arguments by trial."""
        with self._cached(experiments) as cached:
            jobs = {run: self._checkpoint(run, "dev", cached[i]) for i, own in runs.items() for run in own}
            return self._score(jobs, "dev")

    def test(self, runs: Sequence[Run]) -> dict[Run, Predictions]:
        """The test predictions of runs. Record the opening of the test set before."""
        return self._score({run: self._checkpoint(run, "test") for run in runs}, "test")

    def baselines(self, plain: Experiment, folds: Sequence[int]) -> dict[str, list[Predictions]]:
        """Baseline -> its test predictions, one entry per fold. ``plain``: of `frozen`."""
        with self._cached({PROBE: plain}) as cached:
            probes = self._score({fold: _by_probe(plain, fold, cached[PROBE]) for fold in folds}, PROBE)
        by_baseline = {PROBE: [probes[fold] for fold in folds]}
        if importlib.util.find_spec("opensmile"):
            scored = self._score({fold: _by_egemaps(plain, fold) for fold in folds}, EGEMAPS)
            by_baseline[EGEMAPS] = [scored[fold] for fold in folds]
        else:
            self.console.print(f"  baseline {EGEMAPS} skipped: opensmile is not installed", style="dim")
        return by_baseline

    def enrolled(self, runs: Sequence[Run]) -> dict[str, list[list[Enrolled]]]:
        """Dev and test -> for every run, of models that use voices, its predictions with recordings of each speaker
        known."""
        known = ", ".join(map(str, self.space.experiment.protocol.enrolment.recordings))
        self.console.print(f"scoring dev and test with unlabelled recordings of each speaker known: {known}")
        jobs = {(split, run): self._enrolled(run, split) for split in ("dev", "test") for run in runs}
        done = dict(self.pool.map(jobs, "enrolment"))
        return {split: [done[split, run] for run in runs] for split in ("dev", "test")}

    def costs(self, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
        """What every run costs at prediction; see `Scorer.cost`."""
        return dict(self.pool.map({run: self._cost(run) for run in dict.fromkeys(runs)}, "costs"))

    def _score(self, jobs: Mapping[Any, Callable[[Any], Any]], what: str) -> dict[Any, Predictions]:
        """Name of a job -> its predictions; prints progress."""
        done: dict[Any, Predictions] = {}
        for name, predictions in self.pool.map(jobs, what):
            done[name] = predictions
            self.console.print(f"  {what} {len(done)} of {len(jobs)}: {len(predictions)} utterances scored")
        return done

    def _checkpoint(self, run: Run, split: str, cached: CachedFeatures | None = None) -> Callable[[Any], Any]:
        return lambda actor: actor.score.remote(str(self.directory / run.checkpoint), split, cached)

    def _cost(self, run: Run) -> Callable[[Any], Any]:
        return lambda actor: actor.cost.remote(str(self.directory / run.checkpoint))

    def _enrolled(self, run: Run, split: str) -> Callable[[Any], Any]:
        return lambda actor: actor.enrolled.remote(str(self.directory / run.checkpoint), split)

    @contextmanager
    def _cached(self, experiments: Mapping[str, Experiment]) -> Iterator[dict[str, CachedFeatures | None]]:
        """Name of an experiment -> the cached features of the frozen part of its model; None if they are not there."""
        features: dict[str, CachedFeatures | None] = {}
        with ExitStack() as stack:
            for name, experiment in experiments.items():
                wanted = plan.prefix_of(experiment, self.allocation, self.space.storage.prefix_gb)
                found = feature_cache.find(self.space, wanted, self.shard_dirs) if wanted else None
                features[name] = stack.enter_context(found) if found else None
            yield features


def frozen(experiment: Experiment) -> Experiment:
    """The same experiment with a linear classifier on the frozen backbone."""
    plain = {
        "adapter": Adapter(method="frozen"),
        "head": Head(init="probe", pooling="statistics", dropout=0.0),
        "augment": config.Augment(),
        "distil": config.Distil(),
    }
    return experiment.model_copy(update=plain)


# -- below: how it is done


def _by_probe(plain: Experiment, fold: int, cached: CachedFeatures | None) -> Callable[[Any], Any]:
    values = _at_fold(plain, fold)
    return lambda actor: actor.probe.remote(values, "test", cached)


def _by_egemaps(plain: Experiment, fold: int) -> Callable[[Any], Any]:
    values = _at_fold(plain, fold)
    return lambda actor: actor.egemaps.remote(values, "test")


def _at_fold(experiment: Experiment, fold: int) -> dict[str, Any]:
    """The experiment on another fold, as plain types."""
    protocol = experiment.protocol.model_copy(update={"fold": fold})
    return config.to_dict(experiment.model_copy(update={"protocol": protocol}))
