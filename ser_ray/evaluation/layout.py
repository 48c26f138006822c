"""The files of a results folder and of a checkpoint: what each is. The documentation shows these tables, and a test
compares them with what a search leaves."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Final

ENSEMBLE: Final = "ensemble.json"
"""In the directory of an ensemble, beside its members; and in ``evaluation``: how it was chosen."""
CHECKPOINT: Final[Mapping[str, str]] = {
    "adapter/*": "low-rank updates in PEFT's layout (lora, qlora)",
    "backbone/*": "the whole encoder in transformers' layout (full)",
    "head.safetensors": "layer mix, pooling and classifier; with head.speaker the average speaker",
    "experiment.yaml": "the resolved experiment: all that is needed to build the model",
    "labels.json": "index of the output -> emotion",
    "metrics.json": "the record of its epoch; written last, so a checkpoint that has it is complete",
    "calibration.json": "in best/: the temperature of its probabilities and the threshold of its sets, fitted to dev",
    "training/*": "optimiser moments and counters, to resume from; not in best/",
}
"""Of a checkpoint directory: pattern -> what it is."""

FILES: Final[Mapping[str, str]] = {
    "search.yaml": "the resolved search space: every key with its value",
    "plan.json": "what was decided before the first trial: resources, fold, cached features, steps",
    "provenance.json": "what made it: code version, command, packages, hardware, data fingerprints, times",
    "audit.json": "the audit of every fold that is trained: leaky or not, findings, sizes of the splits",
    "audit.csv": "all findings of the audit as a table, with the utterances that experiment.exclude can leave out",
    "sessions.json": "when the search worked on it, for the budgets in hours",
    "folds/*.parquet": "the utterances of each trained fold by split, and where their waveforms are",
    "trials.csv": "a row per trial: status, epochs, searched keys, dev metrics, costs, checkpoint; made from trials/",
    "trials/*/trial.json": "the record of a trial: its values, status, error, seconds, attempts",
    "trials/*/history.jsonl": "a line per epoch: losses, dev metrics, rate, seconds, utterances per second, memory",
    "trials/*/notes.txt": "what a trial did before its first epoch",
    "trials/*/epoch_*/*": "checkpoints: the best and the last epoch",
    "finals/*": "the same as trials/, of finalists trained on further folds and seeds",
    "soups/*": "with tune.ensemble: the mean weights of the seeds of a finalist, a checkpoint for each fold",
    "best/README.md": "the model card of the chosen model",
    "best/ensemble.json": "where the chosen model is an ensemble: its members, their weights, its temperature",
    "best/members/*": "the members of an ensemble, each a checkpoint",
    "best/*": "the chosen checkpoint, without the state to resume from",
    "best-*": "exports of best/ by ser-ray export, such as best-onnx; export.json in each says how it was compared",
    "evaluation/choice.json": "the finalists on dev, which one was chosen and why",
    "evaluation/dev.json": "dev metrics of the chosen model, with intervals",
    "evaluation/test.json": "test metrics with intervals, baselines and gaps; written last",
    "evaluation/calibration.json": "temperature and sets: ECE before and after, coverage by speaker, on dev and test",
    "evaluation/ensemble.json": "with tune.ensemble: members, weights, dev metrics beside the best single model, costs",
    "evaluation/enrolment.json": "with head.speaker: dev and test metrics by how many recordings of a speaker are used",
    "evaluation/enrolment.png": "the same as a picture",
    "evaluation/teacher.json": "of a student of ser-ray distil: its teacher, the gap to it on test, what both cost",
    "evaluation/test_openings.json": "each opening of the test set: when, for which trial, by which command",
    "evaluation/predictions.parquet": "probabilities of the chosen model for every dev and test utterance",
    "evaluation/confusion_*.png": "confusion matrices of dev and test",
    "learning_curves.png": "dev metric over epochs, by trial",
    "report.html": "the report: one page that needs no other file",
    "rerun.json": "in the folder of a rerun: the old and the new value of every metric",
    "leakage.json": "in the folder of ser-ray leakage: metrics by split, and their gaps",
    "tensorboard/*": "epochs for TensorBoard, where tune.log asks for it",
    "mlflow.db": "epochs for MLflow, where tune.log asks for it",
    ".lock": "held by the command that works on the folder",
}
"""Of a results folder: pattern -> what it is. A file is described by the first pattern that matches it."""


def describe(path: str) -> str:
    """What a file of a results folder is, by its path inside the folder; empty for one that is not in `FILES`.

    >>> describe("best/README.md"), describe("best/adapter/adapter_config.json"), describe("mine.txt")
    ('the model card of the chosen model', 'the chosen checkpoint, without the state to resume from', '')
    """
    return next((meaning for pattern, meaning in FILES.items() if fnmatch(str(PurePosixPath(path)), pattern)), "")
