"""Score the finalists on dev, choose one, evaluate it on the test set, and record each step.

    python -m ser_ray.evaluate RESULTS_DIR

Ray actors score the checkpoints in parallel. Trials are compared on dev only, by the mean over the folds and seeds that
``tune.final_folds`` and ``tune.final_seeds`` set. The test split is predicted once, by the chosen configuration, and
every opening is recorded in ``evaluation/test_openings.json``. Running this command again opens it again; an extended
search does so only if it chooses another model.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["evaluate", *sys.argv[1:]]))

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray
import torch
from rich.console import Console

from ser_ray import cache, config, disk
from ser_ray.cache import CachedFeatures
from ser_ray.config import Adapter, Experiment, Head, SearchSpace
from ser_ray.errors import UserError
from ser_ray.evaluation import baselines, egemaps, folder, published
from ser_ray.evaluation.card import model_card
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.evaluation.gaps import corrected, gap_records
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.results import the_probe
from ser_ray.evaluation.summary import summarise, write_predictions
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.models.precision import bound_memory
from ser_ray.protocols.finals import dev_after, final_runs
from ser_ray.protocols.folds import counted_emotions
from ser_ray.protocols.task import Task, load_task, write_fold
from ser_ray.runtime import cluster, plan
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.pool import Pool
from ser_ray.schema import Predictions
from ser_ray.speech import order, stream
from ser_ray.speech.audio import from_int16
from ser_ray.speech.stream import Batch
from ser_ray.training.loop import predict_batches
from ser_ray.training.memory import with_what_fits
from ser_ray.training.probe import start_from_probe

PROBE: Final = "frozen backbone + linear"
EGEMAPS: Final = "eGeMAPS + linear SVM"


@dataclass(frozen=True)
class Run:
    """One trained model of a finalist."""

    trial_id: str
    fold: int
    seed: int
    checkpoint: str
    """Path inside the results folder; empty while it is not trained."""


class Scorer:
    """An evaluation actor: predicts a split with a checkpoint, a linear probe of a frozen backbone, or eGeMAPS."""

    def __init__(self, shard_dirs: Sequence[str], folds: str, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        bound_memory(gpus)
        self.device = torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
        self.shard_dirs, self.folds = [Path(shard_dir) for shard_dir in shard_dirs], Path(folds)

    def score(self, directory: str, split: str, cached: CachedFeatures | None = None) -> Predictions:
        """A checkpoint's predictions on one split of its own fold, in order of utterance id.

        From the waveforms, or from the ``cached`` features if they are given.
        """
        model = checkpoint.load(directory, str(self.device))
        task = self._task(model.experiment)
        model.prefix = cached.prefix if cached else None
        return self._predict(model, task, split, cached)

    def probe(self, values: dict[str, Any], split: str, cached: CachedFeatures | None = None) -> Predictions:
        """The same by logistic regression on the experiment's frozen backbone, on the layer that is best on dev."""
        experiment = Experiment.model_validate(values)
        model, task = build(experiment, self.device), self._task(experiment)
        model.prefix = cached.prefix if cached else None

        def fit(batch_seconds: float) -> None:
            train, dev = (self._batches(task, part, batch_seconds, cached) for part in ("train", "dev"))
            start_from_probe(model, train, dev, lambda value: [value])

        with_what_fits(fit, experiment.batch_seconds)
        return self._predict(model, task, split, cached)

    def egemaps(self, values: dict[str, Any], split: str) -> Predictions:
        """The same by a linear SVM on eGeMAPS features, which openSMILE computes."""
        task = self._task(Experiment.model_validate(values))
        rows = {part: task.rows(part) for part in ("train", split)}
        features = {part: self._features(own) for part, own in rows.items()}
        probabilities_MK = baselines.linear_svm(
            features["train"],
            rows["train"]["label"].to_numpy(),
            rows["train"]["speaker"].to_pylist(),
            features[split],
            len(task.emotions),
        )
        ids = rows[split]["utterance_id"].to_pylist()
        return _predictions(task, split, dict(zip(ids, probabilities_MK, strict=True)))

    def _task(self, experiment: Experiment) -> Task:
        return Task.read(write_fold(experiment, self.shard_dirs, self.folds))

    def _features(self, rows: pa.Table) -> np.ndarray:
        features: list[np.ndarray] = []
        for table in stream.read_files(rows, "audio"):
            features += egemaps.egemaps([from_int16(scalar.as_buffer()) for scalar in table["audio"]])
        return np.stack(features)

    def _batches(
        self, task: Task, split: str, batch_seconds: float, cached: CachedFeatures | None = None
    ) -> Iterator[Batch]:
        prefix, rows = cached.prefix if cached else None, task.rows(split)
        content = stream.content_of(prefix)
        files = stream.Files(rows, content.column, cached.paths[0].parent if cached else None)
        for table, packed in files.read(order.epoch(rows, batch_seconds, None)):
            yield from stream.batches(table, packed, content=content)

    def _predict(self, model: Any, task: Task, split: str, cached: CachedFeatures | None = None) -> Predictions:
        def predict(batch_seconds: float) -> dict[str, np.ndarray]:
            probabilities: dict[str, np.ndarray] = {}
            for batch, logits_BK in predict_batches(model, self._batches(task, split, batch_seconds, cached)):
                rows = logits_BK.double().softmax(-1).cpu().numpy()
                probabilities.update(zip(batch.utterance_ids, rows, strict=True))
            return probabilities

        return _predictions(task, split, with_what_fits(predict, model.experiment.batch_seconds))


def finals(directory: Path, space: SearchSpace, task: Task) -> list[TrialRecord]:
    """The trainings that are needed before the choice: the finalists over folds and seeds, except those that the
    search itself trained."""
    jobs = []
    for finalist in _finalists(directory, space):
        for run in _runs(space, task, finalist):
            if run.checkpoint == "":
                jobs.append(TrialRecord(_final_id(run), {**finalist.values, **_where(space, run)}))
    return jobs


def is_evaluated(directory: Path, space: SearchSpace) -> bool:
    """Whether test.json holds the test metrics of this search with this budget."""
    path = directory / "evaluation" / "test.json"
    return path.is_file() and disk.read_json(path).get("budget") == _budget(space)


def evaluate(
    directory: Path,
    space: SearchSpace,
    console: Console,
    argv: list[str],
    reuse: bool = False,
    allocation: Allocation | None = None,
) -> dict[str, Any]:
    """Fill ``best/`` and ``evaluation/`` of a results folder; returns the test metrics.

    ``reuse``: if the choice is the same as before, reuse its test metrics and do not open the test set.
    ``allocation``: that of the plan, if there is one.

    Raises UserError if no trial left a checkpoint, or the training of a final is missing.
    """
    finalists = _finalists(directory, space)
    provenance = disk.read_json(directory / "provenance.json")
    shard_dirs = [data["directory"] for data in provenance["data"]]
    task = load_task(space.experiment, [Path(shard_dir) for shard_dir in shard_dirs])
    runs = {finalist.trial_id: _trained(directory, _runs(space, task, finalist)) for finalist in finalists}
    everything = [run for own in runs.values() for run in own]
    allocation = allocation or cluster.allocate(space, len(everything), console)
    with Pool(
        ray.remote(Scorer),
        (shard_dirs, str(directory / "folds"), max(1, int(allocation.worker.cpus)), allocation.worker.gpus),
        min(allocation.pool, len(everything)),
        allocation.worker,
        console,
    ) as scorers:
        console.print(f"scoring {len(finalists)} finalist{'s' * (len(finalists) != 1)} on dev")
        experiments = {finalist.trial_id: space.trial(finalist.values) for finalist in finalists}
        with _cached(space, experiments, shard_dirs, allocation) as cached:
            jobs = {run: _by_checkpoint(directory, run, "dev", cached[run.trial_id]) for run in everything}
            dev = _score(scorers, jobs, "dev", console)
        record = _Record(directory, space, task, {i: [dev[run] for run in own] for i, own in runs.items()}, runs)
        chosen = record.choose(finalists)
        answer = record.known(chosen) if reuse else None
        if answer is None:
            probe = the_probe([run.checkpoint for run in runs[chosen]])
            console.print(f"chosen on dev: trial {chosen}{probe and ', ' + probe}; opening the test set")
            _record_opening(directory, chosen, argv)
            jobs = {run: _by_checkpoint(directory, run, "test") for run in runs[chosen]}
            test = _score(scorers, jobs, "test", console)
            folds = {run.fold for run in runs[chosen]}
            plain = _frozen(experiments[chosen])
            with _cached(space, {PROBE: plain}, shard_dirs, allocation) as cached:
                probes = {fold: _by_probe(plain, fold, cached[PROBE]) for fold in sorted(folds)}
                by_baseline = {PROBE: _score(scorers, probes, PROBE, console)}
            if importlib.util.find_spec("opensmile"):
                others = {fold: _by_egemaps(space, fold) for fold in sorted(folds)}
                by_baseline[EGEMAPS] = _score(scorers, others, EGEMAPS, console)
            else:
                console.print(f"  baseline {EGEMAPS} skipped: opensmile is not installed", style="dim")
            parts = {name: [by_fold[fold] for fold in sorted(folds)] for name, by_fold in by_baseline.items()}
            answer = record.test(chosen, [test[run] for run in runs[chosen]], parts)
        else:
            console.print(f"chosen on dev: trial {chosen}; its test metrics are already known")
    metric = space.tune.metric.removeprefix("dev_")
    _install_best(directory, directory / runs[chosen][0].checkpoint, record.dev_metrics(chosen), answer, metric)
    # Written last: its presence means that everything else is there.
    disk.write_json(directory / "evaluation" / "test.json", answer | {"budget": _budget(space)})
    return answer


def main(results_dir: Path) -> int:
    """``ser-ray evaluate``: choose on dev, test the chosen one."""
    directory = results_dir.resolve()
    if not (directory / "trials.csv").is_file():
        raise UserError(f"{directory}: no trials.csv; this is not the results folder of a search")
    console = Console(highlight=False, soft_wrap=True)
    with folder.alone(directory):
        cluster.connect()
        answer = evaluate(directory, config.load(directory / "search.yaml"), console, ["evaluate", str(results_dir)])
    low, high = answer["ci95"]["uar"]
    limits = f"[{low:.3f}, {high:.3f}] over {answer['ci95_unit']}"
    console.print(f"test UAR {answer['uar']:.3f} {limits}; next: ser-ray report {directory}")
    return 0


# -- below: how it is done


@dataclass(frozen=True)
class _Record:
    """Writes the records of the choice and of the test."""

    directory: Path
    space: SearchSpace
    task: Task
    dev: Mapping[str, list[Predictions]]
    """Dev predictions of every finalist, one entry per run."""
    runs: Mapping[str, list[Run]]

    def choose(self, finalists: Sequence[TrialRecord]) -> str:
        """The best on dev; ties go to the one with fewer trainable parameters. Writes ``choice.json``, ``dev.json``."""
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
            gap = _gap(_pooled(self.dev[chosen]), _pooled(self.dev[ranked[1]]))
            against = gap and {"trial_id": ranked[1], "gap": corrected([gap])[0]}
        why = f"highest dev {metric}{over} of {among}; ties go to the one with fewer trainable parameters"
        choice = {"trial_id": chosen, "why": why, "metric": self.space.tune.metric, "finalists": rows}
        disk.write_json(self.directory / "evaluation" / "dev.json", self.dev_metrics(chosen))
        disk.write_json(self.directory / "evaluation" / "choice.json", choice | {"against": against})
        write_predictions(_pooled(self.dev[chosen]), "dev", self.directory / "evaluation" / "predictions.parquet")
        return chosen

    def dev_metrics(self, chosen: str) -> dict[str, Any]:
        """The dev metrics of the chosen trial, over all its runs."""
        return self._summary(_pooled(self.dev[chosen]))

    def known(self, chosen: str) -> dict[str, Any] | None:
        """The test metrics of the same models, if the test set was opened for them before."""
        path = self.directory / "evaluation" / "test.json"
        before: dict[str, Any] = disk.read_json(path) if path.is_file() else {}
        same = [run["checkpoint"] for run in before.get("runs", [])] == [run.checkpoint for run in self.runs[chosen]]
        return before if before and same else None

    def test(
        self, chosen: str, parts: list[Predictions], by_baseline: Mapping[str, list[Predictions]]
    ) -> dict[str, Any]:
        """The test metrics, with baselines; ``by_baseline``: predictions of other models by fold."""
        pooled = _pooled(parts)
        answer = self._summary(pooled)
        answer["runs"] = [self._run(run, p, "") for run, p in zip(self.runs[chosen], parts, strict=True)]
        if len(parts) > 1:
            answer["mean"] = _mean([self._summary(p) for p in parts])
        if self.space.tune.final_seeds > 1:
            answer["seeds_averaged"] = self._ensemble(self.runs[chosen], parts)
        others = {name: _pooled(by_fold) for name, by_fold in by_baseline.items()}
        answer["baselines"] = _simple_baselines(self.task, pooled)
        answer["baselines"] |= {name: _brief(self._summary(predictions)) for name, predictions in others.items()}
        own = _pooled(_averaged_by_fold(self.runs[chosen], parts))
        measured = {name: _gap(own, predictions) for name, predictions in others.items()}
        gaps = {name: gap for name, gap in measured.items() if gap}
        answer["against"] = dict(zip(gaps, corrected(gaps.values()), strict=True))
        answer |= self._seen_by_the_choice(pooled)
        experiment = self.space.experiment
        answer["published"] = published.matching(
            experiment.corpora, config.to_dict(experiment.protocol), pooled.emotions, answer["leaky"]
        )
        write_predictions(pooled, "test", self.directory / "evaluation" / "predictions.parquet")
        return answer

    def _seen_by_the_choice(self, test: Predictions) -> dict[str, int]:
        """How many utterances are tested, and how many of them were dev in another run and so influenced the choice."""
        dev = set(self.task.labels("dev"))  # of the search itself
        dev |= {i for parts in self.dev.values() for part in parts for i in part.utterance_ids}
        tested = set(test.utterance_ids)
        return {"tested": len(tested), "tested_in_dev": len(tested & dev)}

    def _ensemble(self, runs: Sequence[Run], parts: Sequence[Predictions]) -> dict[str, Any]:
        """Metrics of the mean of the seeds' probabilities: of all folds' utterances, and the mean over folds."""
        averaged = _averaged_by_fold(runs, parts)
        metrics = _brief(self._summary(_pooled(averaged)))
        return metrics | {"mean": _mean([self._summary(p) for p in averaged])}

    def _summary(self, predictions: Predictions) -> dict[str, Any]:
        protocol = config.to_dict(self.space.experiment.protocol) | {"description": self._description()}
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


def _finalists(directory: Path, space: SearchSpace) -> list[TrialRecord]:
    trials = [trial for trial in folder.read_trials(directory / "trials") if trial.best and trial.status != "failed"]
    if not trials:
        raise UserError(f"{directory}: no trial left a checkpoint; trials.csv says how each ended")
    trials.sort(key=lambda trial: (-float(trial.best[space.tune.metric]), trial.trial_id))
    return trials[: space.tune.finalists]


def _runs(space: SearchSpace, task: Task, finalist: TrialRecord) -> list[Run]:
    """The models that a finalist is compared by, its own fold and seed first; one still to train has no checkpoint.

    What the search itself finished is not trained again.
    """
    own = (space.experiment.protocol.fold, space.experiment.seed)
    pairs = final_runs(space, task.unsplit)
    trained = f"trials/{finalist.trial_id}/{folder.checkpoint_name(finalist.best['epoch'])}"
    reused = own if finalist.status == "finished" or pairs == [own] else None
    return [Run(finalist.trial_id, *pair, trained if pair == reused else "") for pair in pairs]


def _trained(directory: Path, runs: Iterable[Run]) -> list[Run]:
    """The same runs, with the checkpoints of the finals that have been trained."""
    known = {final.trial_id: final for final in folder.read_trials(directory / "finals")}
    complete = []
    for run in runs:
        if run.checkpoint == "":
            final = known.get(_final_id(run))
            if final is None or final.status != "finished":
                state = "missing" if final is None else f"{final.status} {final.error}"
                raise UserError(f"{directory}/finals/{_final_id(run)}: {state}; run ser-ray tune again")
            name = folder.checkpoint_name(final.best["epoch"])
            run = Run(run.trial_id, run.fold, run.seed, f"finals/{_final_id(run)}/{name}")
        complete.append(run)
    return complete


def _where(space: SearchSpace, run: Run) -> dict[str, Any]:
    """The settings of a run that differ from its finalist's, as dotted keys."""
    own = {"protocol.fold": run.fold, "seed": run.seed}
    if not space.tune.rotate_dev:
        return own
    return own | {"protocol.dev_after": dev_after(space, run.seed)}


def _final_id(run: Run) -> str:
    return f"{run.trial_id}-fold{run.fold}-seed{run.seed}"


def _budget(space: SearchSpace) -> dict[str, Any]:
    names = ("trials", "hours", "gpu_hours", "finalists", "final_folds", "final_seeds", "rotate_dev")
    return {name: config.to_dict(space.tune)[name] for name in names} | {"epochs": space.experiment.epochs}


def _score(pool: Pool, jobs: Mapping[Any, Callable[[Any], Any]], what: str, console: Console) -> dict[Any, Predictions]:
    """Name of a job -> its predictions; prints progress."""
    done: dict[Any, Predictions] = {}
    for name, predictions in pool.map(jobs, what):
        done[name] = predictions
        console.print(f"  {what} {len(done)} of {len(jobs)}: {len(predictions)} utterances scored")
    return done


@contextmanager
def _cached(
    space: SearchSpace, experiments: Mapping[str, Experiment], shard_dirs: list[str], allocation: Allocation
) -> Iterator[dict[str, CachedFeatures | None]]:
    """Name of an experiment -> the cached features of the frozen part of its model; None if they are not there."""
    features: dict[str, CachedFeatures | None] = {}
    with ExitStack() as stack:
        for name, experiment in experiments.items():
            wanted = plan.prefix_of(experiment, allocation, space.storage.prefix_gb)
            cached = stack.enter_context(cache.find(space, wanted, shard_dirs)) if wanted else None
            features[name] = cached
        yield features


def _by_checkpoint(directory: Path, run: Run, split: str, cached: CachedFeatures | None = None) -> Callable[[Any], Any]:
    return lambda actor: actor.score.remote(str(directory / run.checkpoint), split, cached)


def _frozen(experiment: Experiment) -> Experiment:
    """The same experiment with a linear classifier on the frozen backbone."""
    plain = {
        "adapter": Adapter(method="frozen"),
        "head": Head(init="probe", pooling="statistics", dropout=0.0),
        "augment": config.Augment(),
    }
    return experiment.model_copy(update=plain)


def _by_probe(plain: Experiment, fold: int, cached: CachedFeatures | None) -> Callable[[Any], Any]:
    protocol = plain.protocol.model_copy(update={"fold": fold})
    values = config.to_dict(plain.model_copy(update={"protocol": protocol}))
    return lambda actor: actor.probe.remote(values, "test", cached)


def _by_egemaps(space: SearchSpace, fold: int) -> Callable[[Any], Any]:
    values = config.to_dict(space.trial({"protocol.fold": fold}))
    return lambda actor: actor.egemaps.remote(values, "test")


def _predictions(task: Task, split: str, probabilities: dict[str, np.ndarray]) -> Predictions:
    rows = task.rows(split).sort_by("utterance_id")
    ids = rows["utterance_id"].to_pylist()
    assert len(ids) == len(probabilities), (len(ids), len(probabilities))
    predictions = Predictions(
        task.emotions,
        tuple(ids),
        tuple(rows["corpus"].to_pylist()),
        tuple(rows["speaker"].to_pylist()),
        rows["label"].to_numpy(),
        np.stack([probabilities[i] for i in ids]),
    )
    return predictions.over(counted_emotions(task.index, task.emotions, task.fold))


def _pooled(parts: Sequence[Predictions]) -> Predictions:
    """All runs' predictions, one after the other; an utterance counts once for every seed."""

    def joined(name: str) -> tuple[str, ...]:
        return tuple(value for part in parts for value in getattr(part, name))

    return Predictions(
        parts[0].emotions,
        joined("utterance_ids"),
        joined("corpora"),
        joined("speakers"),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
    )


def _averaged_by_fold(runs: Sequence[Run], parts: Sequence[Predictions]) -> list[Predictions]:
    """For every fold the mean of its seeds' probabilities."""
    averaged = []
    for fold in sorted({run.fold for run in runs}):
        own = [part for run, part in zip(runs, parts, strict=True) if run.fold == fold]
        assert len({part.utterance_ids for part in own}) == 1, "one order for all seeds"
        mean = np.mean([part.probabilities for part in own], axis=0)
        first = own[0]
        averaged.append(
            Predictions(first.emotions, first.utterance_ids, first.corpora, first.speakers, first.labels, mean)
        )
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


def _record_opening(directory: Path, trial_id: str, argv: list[str]) -> None:
    """Called before the test set is predicted, so that no opening goes unrecorded."""
    path = directory / "evaluation" / "test_openings.json"
    openings = disk.read_json(path) if path.is_file() else []
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    disk.write_json(path, [*openings, {"when": when, "trial_id": trial_id, "argv": argv}])


def _install_best(directory: Path, source: Path, dev: dict[str, Any], test: dict[str, Any], metric: str) -> None:
    """Copy the chosen checkpoint to ``best/`` with a model card, without the state to resume from."""
    aside, best = directory / ".best.partial", directory / "best"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns("training", ".*"))
    card = model_card(config.load_experiment(aside / "experiment.yaml"), dev, test, metric)
    (aside / "README.md").write_text(card, "utf-8")
    shutil.rmtree(best, ignore_errors=True)
    aside.rename(best)
