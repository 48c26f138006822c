"""Score the finalists on dev, choose one, open the test set for it, and write that down.

    python -m ser_ray.evaluate RESULTS_DIR

Ray actors score the checkpoints in parallel. Trials are compared on dev only; the test split is predicted once, by the
chosen checkpoint, and every opening is recorded in ``evaluation/test_openings.json``.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["evaluate", *sys.argv[1:]]))

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from rich.console import Console

from ser_ray import cluster, config, disk
from ser_ray.config import SearchSpace
from ser_ray.evaluation import baselines, folder
from ser_ray.evaluation.summary import summarise, write_predictions
from ser_ray.models import checkpoint
from ser_ray.protocols.task import Task, load_task
from ser_ray.schema import Predictions, UserError
from ser_ray.speech import shards, stream
from ser_ray.training.loop import predict_batches


@ray.remote
class Scorer:
    """An evaluation actor: one checkpoint in memory, scored on whichever split is asked for."""

    def __init__(self, directory: str, shard_dirs: Sequence[str], threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = checkpoint.load(directory, "cuda" if ray.get_gpu_ids() else "cpu")
        self.shard_dirs = [Path(shard_dir) for shard_dir in shard_dirs]
        self.task = load_task(self.model.experiment, self.shard_dirs)

    def score(self, split: str) -> Predictions:
        """The checkpoint's predictions on one split, in order of utterance id."""
        labels = self.task.labels(split)
        tables = (shards.select(table, labels) for table in shards.read_tables(self.shard_dirs))
        batches = stream.batches(tables, self.model.experiment.batch_seconds, seed=None)
        probabilities: dict[str, np.ndarray] = {}
        for batch, logits_BK in predict_batches(self.model, batches):
            rows = logits_BK.double().softmax(-1).cpu().numpy()
            probabilities.update(zip(batch.utterance_ids, rows, strict=True))
        return _predictions(self.task, labels, probabilities)


def evaluate(directory: Path, space: SearchSpace, console: Console, argv: list[str]) -> dict[str, Any]:
    """Fill ``best/`` and ``evaluation/`` of a results folder; returns the test figures.

    Raises UserError where no trial left a checkpoint.
    """
    finalists = _finalists(directory, space)
    provenance = disk.read_json(directory / "provenance.json")
    shard_dirs = [data["directory"] for data in provenance["data"]]
    one = cluster.worker(space)
    scorers = {
        row["trial_id"]: Scorer.options(num_cpus=one.cpus, num_gpus=one.gpus).remote(  # type: ignore[attr-defined]
            str(directory / row["checkpoint"]), shard_dirs, max(1, int(one.cpus))
        )
        for row in finalists
    }
    console.print(f"scoring {len(scorers)} finalist{'s' * (len(scorers) != 1)} on dev")
    task = load_task(space.experiment, [Path(shard_dir) for shard_dir in shard_dirs])
    protocol = config.to_dict(space.experiment.protocol) | {"description": task.fold.description}
    dev = _score_all(scorers, "dev", console)
    leaky = task.fold.leaky or disk.read_json(directory / "audit.json")["leaky"]
    figures = {trial_id: summarise(predictions, protocol, leaky) for trial_id, predictions in dev.items()}
    chosen = _choose(directory, finalists, figures, space.tune.metric.removeprefix("dev_"))
    disk.write_json(directory / "evaluation" / "dev.json", figures[chosen])
    console.print(f"chosen by dev: trial {chosen}; opening the test set")
    _record_opening(directory, chosen, argv)
    test = _score_all({chosen: scorers[chosen]}, "test", console)[chosen]
    for scorer in scorers.values():
        ray.kill(scorer)
    answer = summarise(test, protocol, leaky)
    answer["baselines"] = _baselines(task, test)
    for split, predictions in (("dev", dev[chosen]), ("test", test)):
        write_predictions(predictions, split, directory / "evaluation" / "predictions.parquet")
    disk.write_json(directory / "evaluation" / "test.json", answer)
    row = next(row for row in finalists if row["trial_id"] == chosen)
    _install_best(directory, directory / row["checkpoint"], figures[chosen], answer)
    return answer


def main(arguments: list[str]) -> int:
    """``ser-ray evaluate RESULTS_DIR``."""
    if len(arguments) != 1:
        raise UserError("name one results folder, such as results/demo")
    directory = Path(arguments[0]).resolve()
    if not (directory / "trials.csv").is_file():
        raise UserError(f"{directory}: no trials.csv; this is no results folder of a search")
    console = Console(highlight=False, soft_wrap=True)
    cluster.connect()
    answer = evaluate(directory, config.load(directory / "search.yaml"), console, ["evaluate", *arguments])
    low, high = answer["ci95"]["uar"]
    console.print(f"test UAR {answer['uar']:.3f} [{low:.3f}, {high:.3f}]; next: ser-ray report {directory}")
    return 0


# -- below: how it is done


def _finalists(directory: Path, space: SearchSpace) -> list[dict[str, str]]:
    rows = [row for row in folder.read_trials(directory) if row["checkpoint"]]
    if not rows:
        raise UserError(f"{directory}: no trial left a checkpoint; trials.csv says how each ended")
    rows.sort(key=lambda row: (-float(row[space.tune.metric]), row["trial_id"]))
    return rows[: space.tune.finalists]


def _score_all(scorers: dict[str, Any], split: str, console: Console) -> dict[str, Predictions]:
    pending = {scorer.score.remote(split): trial_id for trial_id, scorer in scorers.items()}
    scored: dict[str, Predictions] = {}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        trial_id = pending.pop(done)
        scored[trial_id] = ray.get(done)
        console.print(f"  trial {trial_id}: {len(scored[trial_id])} {split} utterances scored")
    return scored


def _predictions(task: Task, labels: dict[str, int], probabilities: dict[str, np.ndarray]) -> Predictions:
    index: pa.Table = task.index
    columns = (index[name].to_pylist() for name in ("utterance_id", "corpus", "speaker"))
    rows = [row for row in zip(*columns, strict=True) if row[0] in labels]
    assert len(rows) == len(probabilities), (len(rows), len(probabilities))
    ids, corpora, speakers = (tuple(column) for column in zip(*rows, strict=True))
    return Predictions(
        task.emotions,
        ids,
        corpora,
        speakers,
        np.array([labels[i] for i in ids], dtype=np.int64),
        np.stack([probabilities[i] for i in ids]),
    )


def _choose(directory: Path, finalists: list[dict[str, str]], figures: dict[str, Any], metric: str) -> str:
    """The best on dev; of equals the one with fewer trainable parameters. Writes ``choice.json``."""
    ranked = sorted(
        finalists,
        key=lambda row: (-figures[row["trial_id"]][metric], int(row["trainable_parameters"]), row["trial_id"]),
    )
    chosen: str = ranked[0]["trial_id"]
    disk.write_json(
        directory / "evaluation" / "choice.json",
        {
            "trial_id": chosen,
            "why": f"highest dev {metric} of {len(ranked)} finalists; of equals the one with fewer weights to train",
            "finalists": [
                {"trial_id": row["trial_id"], "checkpoint": row["checkpoint"]}
                | {f"dev_{name}": figures[row["trial_id"]][name] for name in ("uar", "accuracy", "macro_f1", "kappa")}
                for row in ranked
            ],
        },
    )
    return chosen


def _record_opening(directory: Path, trial_id: str, argv: list[str]) -> None:
    """Written before the test set is predicted, so that no opening goes unrecorded."""
    path = directory / "evaluation" / "test_openings.json"
    openings = disk.read_json(path) if path.is_file() else []
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    disk.write_json(path, [*openings, {"when": when, "trial_id": trial_id, "argv": argv}])


def _baselines(task: Task, test: Predictions) -> dict[str, Any]:
    train = np.array(list(task.labels("train").values()))
    num_emotions = len(task.emotions)
    return {
        "chance": baselines.chance(num_emotions),
        "majority": baselines.majority(train, test.labels, num_emotions),
    }


def _install_best(directory: Path, source: Path, dev: dict[str, Any], test: dict[str, Any]) -> None:
    """Copy the chosen checkpoint to ``best/`` with a model card; without the state to resume from."""
    aside, best = directory / ".best.partial", directory / "best"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns("training", ".*"))
    (aside / "README.md").write_text(_model_card(config.load_experiment(aside / "experiment.yaml"), dev, test), "utf-8")
    shutil.rmtree(best, ignore_errors=True)
    aside.rename(best)


def _model_card(experiment: config.Experiment, dev: dict[str, Any], test: dict[str, Any]) -> str:
    def row(split: str, figures: dict[str, Any]) -> str:
        cells = (f"{figures[m]:.3f} [{figures['ci95'][m][0]:.3f}, {figures['ci95'][m][1]:.3f}]" for m in shown)
        return f"| {split} ({figures['n']}) | {' | '.join(cells)} |"

    shown = ("accuracy", "uar", "macro_f1", "kappa")
    leaky = "**LEAKY: speakers or audio are shared between splits; these figures are inflated.**\n\n"
    return (
        f"# {experiment.name}\n\n"
        f"Speech emotion classifier: {experiment.backbone}, {experiment.adapter.method}; "
        f"emotions: {', '.join(experiment.emotions)}.\n"
        f"Corpora: {', '.join(experiment.corpora)}. Protocol: {test['protocol']['description']}.\n\n"
        f"{leaky if test['leaky'] else ''}"
        "| split (utterances) | accuracy | UAR | macro F1 | kappa |\n|---|---|---|---|---|\n"
        f"{row('dev', dev)}\n{row('test', test)}\n\n"
        f"95 % intervals: bootstrap over {test['ci95_unit']}. Dev chose this checkpoint; test chose nothing.\n\n"
        "Input: mono audio at 16 kHz, silence trimmed as experiment.yaml says. "
        "Use: `ser-ray predict THIS_DIRECTORY AUDIO...`\n\n"
        "Acted speech, a few speakers: expect less on other speakers, languages, microphones and on spontaneous "
        "emotion. Do not use it to judge people.\n"
    )
