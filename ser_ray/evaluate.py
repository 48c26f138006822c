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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from rich.console import Console

from ser_ray import config, disk
from ser_ray.config import Adapter, Experiment, Head, SearchSpace
from ser_ray.evaluation import folder
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.record import Record, install_best, record_opening
from ser_ray.evaluation.results import the_probe
from ser_ray.evaluation.runs import Run, budget, finalists_of, runs_of, trained
from ser_ray.models import prefix
from ser_ray.protocols.task import load_task
from ser_ray.runtime import cluster, feature_cache, plan
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.feature_cache import CachedFeatures
from ser_ray.runtime.pool import Pool
from ser_ray.runtime.results_folder import check_excluded
from ser_ray.runtime.scorer import Scorer
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole
from ser_ray.training.probe import most_utterances

PROBE: Final = "frozen backbone + linear"
EGEMAPS: Final = "eGeMAPS + linear SVM"


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
    finalists = finalists_of(directory, space)
    provenance = disk.read_json(directory / "provenance.json")
    shard_dirs = [data["directory"] for data in provenance["data"]]
    task = load_task(space.experiment, [Path(shard_dir) for shard_dir in shard_dirs])
    check_excluded(directory, [] if task.excluded is None else task.excluded["utterance_id"].to_pylist())
    space = space.over(task.emotions)
    runs = {finalist.trial_id: trained(directory, runs_of(space, task, finalist)) for finalist in finalists}
    everything = [run for own in runs.values() for run in own]
    allocation = allocation or cluster.allocate(space, len(everything), console)
    with Pool(
        ray.remote(Scorer),
        (shard_dirs, str(directory / "folds"), allocation.worker.threads, allocation.worker.gpus),
        min(allocation.pool, len(everything)),
        allocation.worker,
        console,
    ) as scorers:
        console.print(f"scoring {len(finalists)} finalist{'s' * (len(finalists) != 1)} on dev")
        experiments = {finalist.trial_id: space.trial(finalist.values) for finalist in finalists}
        with _cached(space, experiments, shard_dirs, allocation) as cached:
            jobs = {run: _by_checkpoint(directory, run, "dev", cached[run.trial_id]) for run in everything}
            dev = _score(scorers, jobs, "dev", console)
        record = Record(directory, space, task, {i: [dev[run] for run in own] for i, own in runs.items()}, runs)
        chosen = record.choose(finalists)
        answer = record.known(chosen) if reuse else None
        calibrated = record.calibration(chosen, answer)
        if answer is None:
            probe = the_probe([run.checkpoint for run in runs[chosen]])
            console.print(f"chosen on dev: trial {chosen}{probe and ', ' + probe}; opening the test set")
            record_opening(directory, chosen, argv)
            jobs = {run: _by_checkpoint(directory, run, "test") for run in runs[chosen]}
            test = _score(scorers, jobs, "test", console)
            folds = sorted({run.fold for run in runs[chosen]})
            plain = _frozen(experiments[chosen])
            with _cached(space, {PROBE: plain}, shard_dirs, allocation) as cached:
                by_baseline = _score_baselines(scorers, plain, folds, cached[PROBE], console)
            answer = record.test(chosen, [test[run] for run in runs[chosen]], by_baseline, calibrated)
            record.enrolment(chosen, _score_enrolled(directory, experiments[chosen], runs[chosen], scorers, console))
            answer["baselines"][PROBE] |= _part_of_train(plain, len(task.labels("train")))
        else:
            console.print(f"chosen on dev: trial {chosen}; its test metrics are already known")
    metric = space.tune.metric.removeprefix("dev_")
    dev_metrics = record.write_dev(chosen, calibrated)
    install_best(directory, directory / runs[chosen][0].checkpoint, dev_metrics, answer, metric, calibrated)
    # Written last: its presence means that everything else is there.
    disk.write_json(directory / "evaluation" / "test.json", answer | {"budget": budget(space)})
    return answer


def main(results_dir: Path) -> int:
    """``ser-ray evaluate``: choose on dev, test the chosen one."""
    directory = disk.resolved(results_dir)
    if not (directory / "trials.csv").is_file():
        raise UserError(f"{directory}: no trials.csv; this is not the results folder of a search")
    console = PlainConsole()
    with folder.alone(directory):
        cluster.connect()
        answer = evaluate(directory, config.load(directory / "search.yaml"), console, ["evaluate", str(results_dir)])
    low, high = answer["ci95"]["uar"]
    limits = f"[{low:.3f}, {high:.3f}] over {answer['ci95_unit']}"
    console.print(f"test UAR {answer['uar']:.3f} {limits}; next: ser-ray report {directory}")
    return 0


# -- below: how it is done


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
            cached = stack.enter_context(feature_cache.find(space, wanted, shard_dirs)) if wanted else None
            features[name] = cached
        yield features


def _by_checkpoint(directory: Path, run: Run, split: str, cached: CachedFeatures | None = None) -> Callable[[Any], Any]:
    return lambda actor: actor.score.remote(str(directory / run.checkpoint), split, cached)


def _score_enrolled(
    directory: Path, experiment: Experiment, runs: Sequence[Run], scorers: Pool, console: Console
) -> dict[str, list[list[Enrolled]]]:
    """Dev and test -> for every run of the chosen model its predictions with recordings of each speaker known; nothing
    for a model that does not use them."""
    if experiment.head.speaker == "none":
        return {}
    known = ", ".join(map(str, experiment.protocol.enrolment.recordings))
    console.print(f"scoring dev and test with unlabelled recordings of each speaker known: {known}")
    jobs = {(split, run): _by_enrolled(directory, run, split) for split in ("dev", "test") for run in runs}
    done = dict(scorers.map(jobs, "enrolment"))
    return {split: [done[split, run] for run in runs] for split in ("dev", "test")}


def _by_enrolled(directory: Path, run: Run, split: str) -> Callable[[Any], Any]:
    return lambda actor: actor.enrolled.remote(str(directory / run.checkpoint), split)


def _score_baselines(
    scorers: Pool, plain: Experiment, folds: Sequence[int], cached: CachedFeatures | None, console: Console
) -> dict[str, list[Predictions]]:
    """Baseline -> its test predictions, one entry per fold."""
    jobs = {fold: _by_probe(plain, fold, cached) for fold in folds}
    probes = _score(scorers, jobs, PROBE, console)
    by_baseline = {PROBE: [probes[fold] for fold in folds]}
    if importlib.util.find_spec("opensmile"):
        others = {fold: _by_egemaps(plain, fold) for fold in folds}
        scored = _score(scorers, others, EGEMAPS, console)
        by_baseline[EGEMAPS] = [scored[fold] for fold in folds]
    else:
        console.print(f"  baseline {EGEMAPS} skipped: opensmile is not installed", style="dim")
    return by_baseline


def _part_of_train(plain: Experiment, utterances: int) -> dict[str, int]:
    """Of how many utterances of train the probe was fitted on a part, and on how many; nothing if on all."""
    states = prefix.of(plain, "fp32")
    most = most_utterances(states.num_states, 2 * states.width)
    return {"train": utterances, "fitted_on": most} if utterances > most else {}


def _frozen(experiment: Experiment) -> Experiment:
    """The same experiment with a linear classifier on the frozen backbone."""
    plain = {
        "adapter": Adapter(method="frozen"),
        "head": Head(init="probe", pooling="statistics", dropout=0.0),
        "augment": config.Augment(),
    }
    return experiment.model_copy(update=plain)


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
