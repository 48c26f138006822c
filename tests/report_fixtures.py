"""A results folder written by hand, as small or as complete as a test wants it, and a page taken apart."""

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from ser_ray import config
from ser_ray.evaluation import folder as results_folder
from ser_ray.evaluation.baselines import chance, majority
from ser_ray.evaluation.exports import fingerprint
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.summary import summarise, write_predictions
from ser_ray.report import print_summary
from ser_ray.speech import shards

HOSTILE = '<script>alert("x")</script> $\\frac{[red]'
SPACE = {
    "experiment": {
        "name": "ravdess-whisper",
        "corpora": {"ravdess": "data/ravdess", "emodb": "data/emodb"},
        "backbone": "openai/whisper-base",
        "protocol": {"scheme": "speaker_kfold", "folds": 6, "fold": 0},
    },
    "search": {"adapter.rank": {"choice": [4, 8, 16]}, "optimizer.lr": {"loguniform": [1e-5, 1e-3]}},
}
TRIALS = (  # not in the order of their dev UAR; 0007 and 1e10 must stay as they are
    {"trial_id": "0007", "status": "stopped", "adapter.rank": 4, "optimizer.lr": 2.5e-5, "dev_uar": 0.41},
    {"trial_id": "1e10", "status": "finished", "adapter.rank": 16, "optimizer.lr": 3.14159e-4, "dev_uar": 0.713},
    {"trial_id": "broken", "status": "failed", "adapter.rank": 8, "optimizer.lr": 9e-4, "dev_uar": ""},
    {"trial_id": "second", "status": "finished", "adapter.rank": 8, "optimizer.lr": 1.2e-4, "dev_uar": 0.688},
)
DEV_UAR = {"0007": [0.2, 0.41], "1e10": [0.3, 0.5, 0.64, 0.713], "second": [0.28, 0.55, 0.688]}


def predictions(seed, n=140, speakers=5):
    emotions = config.Experiment.model_fields["emotions"].default
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(emotions) - 1, n)  # nobody is surprised
    logits = rng.standard_normal((n, len(emotions))) + 2 * np.eye(len(emotions))[labels]
    speakers = tuple(f"{'ravdess' if i % 2 else 'emodb'}/{i % (2 * speakers):02}" for i in range(n))
    return Predictions(
        emotions=emotions,
        utterance_ids=tuple(f"{speaker}-{i}" for i, speaker in enumerate(speakers)),
        corpora=tuple(speaker.partition("/")[0] for speaker in speakers),
        speakers=speakers,
        labels=labels,
        probabilities=np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
    )


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_search(folder: Path, leaky=False, detail="none") -> Path:
    """What there is while trials are running."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(SPACE)))
    provenance = {
        "version": "0.1.0",
        "argv": ["tune", "search spaces/reference.yaml"],
        "started": "2026-01-05 09:00",
        "finished": None,
        "host": HOSTILE,
        "python": "3.11.9",
        "packages": {"torch": "2.14.1", "ray": "2.60.0"},
        "gpus": ["H100"],
        "seed": 0,
        "data": [{"corpus": "ravdess", "fingerprint": "abc123", "utterances": 1440, "hours": 1.48, "rejected": 1}],
    }
    write_json(folder / "provenance.json", provenance)
    splits = {
        s: {"utterances": n, "speakers": 10, "emotions": {"angry": n}} for s, n in (("train", 900), ("test", 140))
    }
    finding = {"level": "leak" if leaky else "note", "what": "the same audio twice", "detail": detail}
    write_json(folder / "audit.json", {"leaky": leaky, "findings": [finding], "splits": splits})
    constant = {"dev_accuracy": 0.7, "dev_macro_f1": 0.69, "dev_kappa": 0.64, "peak_memory_mb": 2048.0}
    rows = [constant | {"epochs": 4, "seconds": 4000, "best_epoch": 3, "checkpoint": ""} | row for row in TRIALS]
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[1]))
        writer.writeheader()
        writer.writerows(rows)
    for trial, values in DEV_UAR.items():
        history = folder / "trials" / trial / "history.jsonl"
        history.parent.mkdir(parents=True)
        lines = [
            {"epoch": e, "train_loss": None if e == 0 else 2 / (e + 1), "dev_loss": 2.1 / (e + 1), "dev_uar": value}
            for e, value in enumerate(values)
        ]
        history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_results(folder: Path, leaky=False, detail="none") -> Path:
    """A finished search: the above and an evaluation of the winner."""
    write_search(folder, leaky, detail)
    protocol = SPACE["experiment"]["protocol"]
    test = predictions(seed=1)
    baselines = {"chance": chance(7), "majority": majority(np.array([3, 3, 1]), test.labels, 7)}
    write_json(folder / "evaluation/dev.json", summarise(predictions(seed=0), protocol, leaky))
    write_json(folder / "evaluation/test.json", summarise(test, protocol, leaky) | {"baselines": baselines})
    choice = {"trial_id": "second", "finalists": [{"trial_id": "second", "dev_uar": 0.72}], "why": "best rescored UAR"}
    write_json(folder / "evaluation/choice.json", choice)
    write_json(folder / "evaluation/test_openings.json", [{"when": "2026", "trial_id": "second", "argv": []}])
    (folder / "best").mkdir()
    return folder


def write_everything(folder: Path, leaky=False, detail="none") -> Path:
    """The above and all that a search may leave beside: predictions, folds and seeds, baselines, published figures."""
    write_results(folder, leaky, detail)
    for split, seed in (("dev", 0), ("test", 1)):
        write_predictions(predictions(seed=seed), split, folder / "evaluation/predictions.parquet")
    choice, test = (json.loads((folder / f"evaluation/{name}.json").read_text()) for name in ("choice", "test"))
    runs = [{"fold": fold, "seed": 0, "checkpoint": "", "dev_uar": 0.7 + fold / 100} for fold in range(3)]
    metrics = {"dev_uar": 0.72, "dev_accuracy": 0.7, "dev_macro_f1": 0.7, "dev_kappa": 0.6}
    finalists = [metrics | {"trial_id": name, "trainable_parameters": 7, "runs": runs} for name in ("second", "1e10")]
    gap = {"uar": {"difference": 0.003, "ci95": [-0.013, 0.007], "p": 0.3}}
    write_json(
        folder / "evaluation/choice.json",
        choice | {"metric": "uar", "finalists": finalists, "against": {"trial_id": "1e10", "gap": gap}},
    )
    chosen = {name: test[name] for name in ("uar", "accuracy", "macro_f1", "weighted_f1", "kappa")}
    test["mean"] = chosen | {"uar": 0.712}
    test["seeds_averaged"] = chosen | {"uar": 0.731, "mean": chosen | {"uar": 0.735}}
    test["runs"] = [chosen | {"fold": fold, "seed": 0, "n": 47, "uar": 0.701 + fold / 100} for fold in range(3)]
    test["baselines"]["frozen backbone + linear"] = chosen | {"uar": 0.671, "ci95": {"uar": [0.64, 0.69]}}
    test["against"] = {"frozen backbone + linear": {"uar": {"difference": 0.041, "ci95": [0.01, 0.072], "p": 0.0004}}}
    test["published"] = [
        {"name": "HuBERT-base, frozen", "uar": 0.654, "accuracy": 0.662, "source": "EmoBox, table 4"},
        {"name": "HuBERT-large, frozen", "uar": 0.7, "accuracy": 0.703, "source": "EmoBox, table 4", "note": "6 folds"},
        {"name": "people", "uar": None, "accuracy": 0.9, "source": "them"},
    ]
    write_json(folder / "evaluation/test.json", test)
    return folder


def write_trials(folder: Path, count: int, seed=0) -> config.SearchSpace:
    """Trials with their own folders, over a space with a choice, a range, and a key that only some of them have."""
    search = {
        "adapter.method": {"choice": ["full", "lora"]},
        "adapter.rank": {"choice": [4, 8, 16], "when": {"adapter.method": ["lora"]}},
        "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
        "head.dropout": {"uniform": [0.0, 0.5]},
    }
    space = config.SearchSpace.model_validate({**SPACE, "search": search})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(config.dump(space))
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        lr, dropout = float(10 ** rng.uniform(-5, -3)), float(rng.uniform(0, 0.5))
        values = {"adapter.method": ("full", "lora")[number % 2], "optimizer.lr": lr, "head.dropout": dropout}
        if number % 2:
            values["adapter.rank"] = (4, 8, 16)[number % 3]
        uar = 0.8 - 0.2 * abs(np.log10(lr) + 4) + 0.001 * rng.standard_normal()  # the rate alone matters
        history = []
        for epoch in range(1, 9):
            figure = uar * (1 - 0.5**epoch)
            history.append(
                {"epoch": epoch, "train_loss": 2 / epoch, "dev_loss": 2.1 / epoch, "seconds": 10.0 + number}
                | {"peak_memory_mb": 1000.0 + 10 * number, "trainable_parameters": 10 ** (3 + number % 4)}
                | {f"dev_{name}": figure for name in ("uar", "accuracy", "macro_f1", "kappa")}
                | {"best_dev_uar": figure, "best_epoch": epoch}
            )
            results_folder.append_history(folder / "trials" / f"{number:03}", history[-1])
        tried = results_folder.TrialRecord(f"{number:03}", values, "finished", seconds=80.0, history=history)
        results_folder.write_trial(folder / "trials", tried)
        rows.append(results_folder.trial_row(tried, search))
    results_folder.write_trials(folder, rows)
    return space


def write_speech(directory: Path, utterance_ids) -> Path:
    """Prepared shards of a corpus in which every utterance is 0.2 to 0.4 s of noise."""
    rng = np.random.default_rng(0)
    rows = []
    for i, utterance_id in enumerate(utterance_ids):
        samples = (3000 * rng.standard_normal(3200 + 100 * (i % 32))).astype("<i2")
        row = dict.fromkeys(shards.SCHEMA.names) | {"utterance_id": utterance_id, "corpus": "ravdess", "speaker": "s"}
        row |= {"emotion": "angry", "path": f"{i}.wav", "duration": len(samples) / 16000, "num_samples": len(samples)}
        rows.append(row | {"audio_sha256": str(i), "audio": samples.tobytes()})
    names = []
    for part in (rows[::2], rows[1::2]):
        names.append(f"part-{len(names)}.parquet")
        shards.write_shard(pa.Table.from_pylist(part, shards.SCHEMA), directory / names[-1])
    shards.write_manifest(directory, "ravdess", names, [], config.Audio())
    return directory


def point_to_speech(folder: Path, *directories: Path) -> None:
    """Let the provenance of a results folder say where its prepared speech lies."""
    provenance = json.loads((folder / "provenance.json").read_text())
    data = {"corpus": "ravdess", "fingerprint": "abc123", "utterances": 1440, "hours": 1.48, "rejected": 1}
    provenance["data"] = [data | {"directory": str(directory)} for directory in directories]
    write_json(folder / "provenance.json", provenance)


class Page(HTMLParser):
    """The text of a page, its elements, and whether every element that opens is closed."""

    VOID = ("meta", "wbr", "br", "img", "link", "use", "path", "defs")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.words, self.elements, self.open = path.read_text(encoding="utf-8"), [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def count(self, tag):
        return sum(1 for name, _ in self.elements if name == tag)

    def read_aloud(self):
        return {attributes["aria-label"] for _, attributes in self.elements if "aria-label" in attributes}


def printed(folder: Path, width=160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(folder, console)
    return console.file.getvalue()


def write_export(folder: Path, name: str, **about) -> Path:
    """What `ser-ray export` leaves in a results folder, as far as a report reads it; of its best/ unless told."""
    proof = {"on": "dev utterances of search", "limit": 1e-4, "largest": 1.23e-7}
    record = {"format": "onnx", "dtype": "fp32", "made": "2026-01-06", "checkpoint": "search/best", "bytes": 78_900_000}
    record |= {"fingerprint": fingerprint(folder / "best"), "proof": proof}
    write_json(folder / name / "export.json", record | about)
    return folder / name
