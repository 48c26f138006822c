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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from ser_ray import config, disk
from ser_ray.config import Experiment, SearchSpace
from ser_ray.evaluation import ensemble, folder
from ser_ray.evaluation.best import install_best
from ser_ray.evaluation.calibration import Calibration
from ser_ray.evaluation.enrolment import Enrolled
from ser_ray.evaluation.ensemble import Chosen
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.record import Record, record_opening
from ser_ray.evaluation.results import the_probe
from ser_ray.evaluation.runs import Run, budget, finalists_of, runs_of, trained
from ser_ray.models import prefix, soup
from ser_ray.protocols.task import load_task
from ser_ray.runtime import cluster
from ser_ray.runtime.allocation import Allocation
from ser_ray.runtime.pool import Pool
from ser_ray.runtime.results_folder import check_excluded
from ser_ray.runtime.scorer import Scorer
from ser_ray.runtime.scoring import PROBE, Scoring, frozen
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole
from ser_ray.training.probe import most_utterances


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
    experiments = {finalist.trial_id: space.trial(finalist.values) for finalist in finalists}
    total = sum(map(len, runs.values()))
    allocation = allocation or cluster.allocate(space, total, console)
    with Pool(
        ray.remote(Scorer),
        (shard_dirs, str(directory / "folds"), allocation.worker.threads, allocation.worker.gpus),
        min(allocation.pool, total),
        allocation.worker,
        console,
        grows=True,
    ) as pool:
        scoring = Scoring(directory, space, shard_dirs, allocation, pool, console)
        console.print(f"scoring {len(finalists)} finalist{'s' * (len(finalists) != 1)} on dev")
        dev = scoring.dev(runs, experiments)
        record = Record(directory, space, task, {i: [dev[run] for run in own] for i, own in runs.items()}, runs)
        best = record.choose(finalists)
        chosen = ensemble.trial(runs[best], record.dev[best])
        if space.tune.ensemble:
            record, chosen = _with_ensemble(scoring, record, chosen, experiments, dev)
        else:
            (directory / "evaluation" / ENSEMBLE).unlink(missing_ok=True)  # of an earlier choice
        answer = record.known(chosen.name) if reuse else None
        calibrated = record.calibration(chosen.name, answer)
        if answer is None:
            answer = _test(scoring, record, chosen, experiments, calibrated, argv)
        else:
            console.print(f"chosen on dev: {_named(chosen)}; its test metrics are already known")
    metric = space.tune.metric.removeprefix("dev_")
    install_best(directory, chosen, record.write_dev(chosen.name, calibrated), answer, metric, calibrated)
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


def _with_ensemble(
    scoring: Scoring,
    record: Record,
    single: Chosen,
    experiments: Mapping[str, Experiment],
    dev: dict[Run, Predictions],
) -> tuple[Record, Chosen]:
    """`Record.with_ensemble`, with the dev predictions of averaged weights, and what the chosen one costs."""
    soups = {} if record.space.tune.rotate_dev else _soups(record, experiments)
    if soups:
        scoring.console.print("scoring the mean weights of the seeds of each finalist on dev")
        dev = dev | scoring.dev(soups, {i: experiments[i] for i in soups})
    record, chosen = record.with_ensemble(single, soups, dev)
    if chosen is not single:
        firsts = [member.candidate.runs[0] for member in chosen.members]
        alone = single.members[0].candidate.runs[0]
        of_run = scoring.costs([*firsts, alone])
        record.write_costs({"ensemble": ensemble.total([of_run[run] for run in firsts]), "single": of_run[alone]})
    return record, chosen


def _soups(record: Record, experiments: Mapping[str, Experiment]) -> dict[str, list[Run]]:
    """Finalist -> the mean weights of its seeds, a run in each fold; written below ``soups``. (With `Tune.rotate_dev`
    there are none: every dev was trained on by a seed.)"""
    made: dict[str, list[Run]] = {}
    for trial_id, runs in record.runs.items():
        by_fold: dict[int, list[Run]] = {}
        for run in runs:
            by_fold.setdefault(run.fold, []).append(run)
        count = len(next(iter(by_fold.values())))
        if count > 1 and soup.can_average(experiments[trial_id], count):
            for fold, own in by_fold.items():
                place = f"soups/{trial_id}-fold{fold}"
                (record.directory / "soups").mkdir(exist_ok=True)
                soup.average([record.directory / run.checkpoint for run in own], record.directory / place)
                made.setdefault(trial_id, []).append(Run(trial_id, fold, own[0].seed, place, soup=True))
    return made


def _test(
    scoring: Scoring,
    record: Record,
    chosen: Chosen,
    experiments: Mapping[str, Experiment],
    calibrated: Calibration,
    argv: list[str],
) -> dict[str, Any]:
    """Open the test set for the chosen model and the baselines, of which one is the best single model if an ensemble
    was chosen; returns the test metrics."""
    single = chosen.single[0].trial_id
    plain = frozen(experiments[single])
    scoring.console.print(f"chosen on dev: {_named(chosen)}; opening the test set")
    record_opening(record.directory, chosen.name, argv)
    test = scoring.test(chosen.needed)
    by_baseline = scoring.baselines(plain, [run.fold for run in chosen.single])
    if chosen.name == ensemble.NAME:
        by_baseline = {f"best single model, trial {single}": [test[run] for run in chosen.single]} | by_baseline
    answer = record.test(chosen.name, ensemble.answers(chosen.members, test), by_baseline, calibrated)
    record.enrolment(chosen.name, _enrolled(scoring, chosen, experiments, test))
    answer["baselines"][PROBE] |= _part_of_train(plain, len(record.task.labels("train")))
    return answer


def _enrolled(
    scoring: Scoring, chosen: Chosen, experiments: Mapping[str, Experiment], test: Mapping[Run, Predictions]
) -> dict[str, list[list[Enrolled]]]:
    """Dev and test -> for every run of the chosen model its predictions with recordings of each speaker known; nothing
    if no member uses them. One that does not use them answers as ever."""
    candidates = [member.candidate for member in chosen.members]
    using = [c for c in candidates if experiments[c.runs[0].trial_id].head.speaker != "none"]
    if not using:
        return {}
    runs = list(dict.fromkeys(run for candidate in using for run in candidate.runs))
    found = {split: dict(zip(runs, own, strict=True)) for split, own in scoring.enrolled(runs).items()}
    plain = {"dev": {run: part for c in candidates for run, part in zip(c.runs, c.dev, strict=True)}, "test": test}
    return {split: ensemble.enrolled_answers(chosen.members, found[split], plain[split]) for split in found}


def _named(chosen: Chosen) -> str:
    """A model as lines of the terminal name it."""
    runs = [run for member in chosen.members for run in member.candidate.runs]
    if chosen.name == ensemble.NAME:
        return f"an ensemble of {len(chosen.members)} models" if len(chosen.members) > 1 else str(runs[0])
    probe = the_probe([run.checkpoint for run in runs])
    return f"trial {chosen.name}{probe and ', ' + probe}"


def _part_of_train(plain: Experiment, utterances: int) -> dict[str, int]:
    """Of how many utterances of train the probe was fitted on a part, and on how many; nothing if on all."""
    states = prefix.of(plain, "fp32")
    most = most_utterances(states.num_states, 2 * states.width)
    return {"train": utterances, "fitted_on": most} if utterances > most else {}
