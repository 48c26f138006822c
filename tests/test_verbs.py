"""The verbs on real Ray and a small corpus: train in three ways, tune, evaluate, report, predict, what they refuse."""

from __future__ import annotations

import csv
import fnmatch
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from ser_ray import config, disk
from ser_ray.__main__ import main
from ser_ray.evaluation import layout
from ser_ray.evaluation.folder import read_trials, trial_history
from ser_ray.evaluation.summary import read_predictions
from ser_ray.models import checkpoint
from ser_ray.runtime import paths

SPACE = {
    "experiment": {
        "name": "tiny",
        "emotions": ["angry", "fear", "happy", "sad"],
        "protocol": {"scheme": "speaker_kfold", "folds": 3},
        "backbone": "embedded/tiny-whisper",
        "adapter": {"method": "full"},
        "head": {"pooling": "statistics", "dropout": 0.0},
        "optimizer": {"lr": 1.0e-3, "head_lr": 1.0e-3},
        "batch_seconds": 8,
        "epochs": 2,
    },
    "search": {
        "adapter.method": {"choice": ["qlora", "full"]},
        "adapter.rank": {"choice": [2, 4], "when": {"adapter.method": ["qlora"]}},
        "optimizer.lr": {"loguniform": [1.0e-4, 1.0e-2]},
    },
    "tune": {
        "trials": 3,
        "grace": 1,
        "finalists": 2,
        "first": [
            {"adapter.method": "qlora", "adapter.rank": 2, "optimizer.lr": 1.0e-3},
            {"adapter.method": "full", "optimizer.lr": 1.0e-3},
        ],
    },
}


def write_space(directory: Path, corpus: Path, prepared: Path | None = None) -> Path:
    """The search space as a file, with results and cache beside it; the cache may be a copy of a ``prepared`` one."""
    if prepared is not None:
        shutil.copytree(prepared, directory / "cache", dirs_exist_ok=True)
    content = json.loads(json.dumps(SPACE))
    content["experiment"]["corpora"] = {"ravdess": str(corpus)}
    content["storage"] = {"results": str(directory / "results"), "cache": str(directory / "cache")}
    path = directory / "space.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def space(tiny_corpus, tiny_cache, tmp_path_factory) -> Path:
    return write_space(tmp_path_factory.mktemp("verbs"), tiny_corpus, tiny_cache)


def results_of(space: Path, name: str) -> Path:
    return space.parent / "results" / name


def train(space: Path, name: str, *overrides: str) -> list[dict]:
    assert main(["train", str(space), f"experiment.name={name}", *overrides]) == 0
    return trial_history(results_of(space, name) / "trials" / "single")


def copy_results(space: Path, name: str, copy: str) -> Path:
    """The results of a run under another name."""
    shutil.copytree(results_of(space, name), results_of(space, copy))
    settings = results_of(space, copy) / "search.yaml"
    settings.write_text(settings.read_text().replace(f"name: {name}\n", f"name: {copy}\n"))
    return results_of(space, copy)


@pytest.fixture(scope="module")
def local(space) -> list[dict]:
    """The history of one trial in this process."""
    return train(space, "local", "resources.workers=0")


@pytest.fixture(scope="module")
def worker(space, ray_cluster) -> list[dict]:
    """That of the same trial on Ray."""
    return train(space, "worker")


@pytest.mark.ray
def test_local_mode_and_one_worker_take_the_same_steps(local, worker):
    assert [r["epoch"] for r in worker] == [r["epoch"] for r in local] == [1, 2]
    for ours, theirs in zip(worker, local, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
        assert ours["dev_uar"] == pytest.approx(theirs["dev_uar"], abs=0.05)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_see_all_of_dev_and_learn_the_same_task(space, local, ray_cluster):
    """With rates of nearly nothing the dev loss is the untrained model's, to the last digits, however dev is shared."""
    still = ["experiment.optimizer.lr=1e-12", "experiment.optimizer.head_lr=1e-12", "experiment.epochs=1"]
    two = ["resources.workers=2", "resources.cpus_per_worker=1"]
    alone, shared = train(space, "still-1", "resources.workers=0", *still), train(space, "still-2", *two, *still)
    assert shared[0]["dev_loss"] == pytest.approx(alone[0]["dev_loss"], rel=1e-5)
    assert shared[0]["dev_uar"] == pytest.approx(alone[0]["dev_uar"], abs=1e-9)
    # Half the batch a worker and twice the workers: the same global batch, drawn in another order.
    moved = train(space, "two", *two, "experiment.batch_seconds=4")
    assert moved[-1]["train_loss"] < moved[0]["train_loss"]
    assert moved[-1]["dev_loss"] == pytest.approx(local[-1]["dev_loss"], rel=0.25)


ONE_STEP = ["experiment.epochs=1", "experiment.optimizer.accumulate=1000"]


@pytest.fixture(scope="module")
def one_batch(space) -> list[dict]:
    """An epoch that is one batch, and one step."""
    return train(space, "one-batch", "resources.workers=0", *ONE_STEP, "experiment.batch_seconds=1000")


def test_many_small_batches_in_one_step_are_the_step_of_one_large_one(space, one_batch):
    small = train(space, "small", "resources.workers=0", *ONE_STEP, "experiment.batch_seconds=2.5")
    for name in ("train_loss", "dev_loss"):
        assert small[-1][name] == pytest.approx(one_batch[-1][name], abs=1e-4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("data", ["resident", "streamed"])
def test_two_workers_take_the_step_of_one_large_batch(space, one_batch, data, ray_cluster):
    two = ["resources.workers=2", "resources.cpus_per_worker=1", f"resources.data={data}"]
    shared = train(space, f"two-{data}", *two, *ONE_STEP, "experiment.batch_seconds=2.5")
    for name in ("train_loss", "dev_loss"):
        assert shared[-1][name] == pytest.approx(one_batch[-1][name], abs=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_streamed_and_resident_take_the_same_steps(space, local, ray_cluster):
    plain = train(space, "files", "resources.data=streamed", "resources.workers=0")
    resident, streamed = (train(space, f"by-{way}", f"resources.data={way}") for way in ("resident", "streamed"))
    for one, other in [*zip(resident, streamed, strict=True), *zip(local, plain, strict=True)]:
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert one["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-6)


@pytest.mark.parametrize("weights", ["balanced", "none"])
def test_class_weights_count_with_one_utterance_a_batch_too(lopsided, weights):
    """They once canceled: the mean of a batch of one is its loss, whatever its weight."""
    overrides = [f"experiment.class_weights={weights}", "resources.workers=0", "experiment.epochs=1"]
    large, single = (
        train(lopsided, f"{weights}-{seconds}", *overrides, *ONE_STEP, f"experiment.batch_seconds={seconds}")
        for seconds in (1000, 0.1)
    )
    assert single[-1]["train_loss"] == pytest.approx(large[-1]["train_loss"], abs=1e-4)
    if weights == "balanced":
        plain = train(
            lopsided, "plain", *overrides[1:], "experiment.class_weights=none", "experiment.batch_seconds=0.1"
        )
        assert single[-1]["train_loss"] != pytest.approx(plain[-1]["train_loss"], abs=1e-3)


@pytest.fixture(scope="module")
def lopsided(tiny_corpus, tmp_path_factory) -> Path:
    """Twice as many angry recordings as others: of the rest one take of two is missing."""
    directory = tmp_path_factory.mktemp("lopsided")
    corpus = directory / "ravdess"
    for path in tiny_corpus.rglob("*.wav"):
        emotion, statement = path.name.split("-")[2], path.name.split("-")[4]
        if emotion == "05" or statement == "01":
            (corpus / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, corpus / path.parent.name / path.name)
    return write_space(directory, corpus)


ALWAYS_THERE = layout.FILES.keys() - {
    *("finals/*", "rerun.json", "leakage.json", "tensorboard/*", "mlflow.db", "trials/*/notes.txt", ".lock"),
    *("evaluation/enrolment.json", "evaluation/enrolment.png", "evaluation/teacher.json"),
    *("evaluation/enrolment.json", "evaluation/enrolment.png"),
    *("evaluation/ensemble.json", "best/ensemble.json", "best/members/*", "soups/*"),
    "best-*",
}
"""Of what a results folder may hold: what every search leaves."""


@pytest.fixture(scope="module")
def tuned(space, ray_cluster) -> Path:
    """The results folder of a finished search."""
    assert main(["tune", str(space)]) == 0
    return results_of(space, "tiny")


@pytest.mark.ray
def test_a_search_leaves_everything_that_it_promises(tuned):
    made = """search.yaml provenance.json audit.json trials.csv report.html best/README.md best/head.safetensors
        best/experiment.yaml best/labels.json evaluation/dev.json evaluation/test.json evaluation/choice.json
        evaluation/test_openings.json evaluation/predictions.parquet evaluation/confusion_test.png"""
    for name in made.split():
        assert (tuned / name).is_file(), name
    files = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert [name for name in files if not layout.describe(name)] == [], "a file that layout.FILES does not explain"
    assert [pattern for pattern in ALWAYS_THERE if not fnmatch.filter(files, pattern)] == []
    rows = list(csv.DictReader((tuned / "trials.csv").open()))
    assert len(rows) == 3
    assert {row["status"] for row in rows} <= {"finished", "stopped"}
    assert {row["adapter.method"] for row in rows} == {"qlora", "full"}
    assert all(bool(row["adapter.rank"]) == (row["adapter.method"] == "qlora") for row in rows), "rank is conditional"
    for row in rows:
        assert (tuned / row["checkpoint"] / "metrics.json").is_file()
        history = trial_history(tuned / "trials" / row["trial_id"])
        assert max(r["dev_uar"] for r in history) == pytest.approx(float(row["dev_uar"]))
    assert len(json.loads((tuned / "evaluation/test_openings.json").read_text())) == 1


@pytest.mark.ray
def test_dev_chose_and_test_is_whole(tuned):
    choice = json.loads((tuned / "evaluation/choice.json").read_text())
    rows = sorted((float(r["dev_uar"]) for r in csv.DictReader((tuned / "trials.csv").open())), reverse=True)
    assert choice["finalists"][0]["trial_id"] == choice["trial_id"]
    assert choice["finalists"][0]["dev_uar"] == pytest.approx(rows[0]), "actors and loop agree on dev"
    test = json.loads((tuned / "evaluation/test.json").read_text())
    predictions = read_predictions(tuned / "evaluation/predictions.parquet")
    splits = {split: set(p.speakers) for split, p in predictions.items()}
    assert test["n"] == len(predictions["test"]) == 16
    assert not splits["dev"] & splits["test"]
    assert test["accuracy"] == pytest.approx(np.mean(predictions["test"].predicted == predictions["test"].labels))
    assert test["leaky"] is False
    low, high = test["ci95"]["uar"]
    assert low <= test["uar"] <= high


@pytest.mark.ray
def test_a_process_that_trains_again_takes_the_steps_of_a_new_one(tuned, space):
    """A search trains its trials in processes that had others before; ``train`` in this one, from the same point."""
    for row in csv.DictReader((tuned / "trials.csv").open()):
        keys = ("adapter.method", "adapter.rank", "optimizer.lr")
        point = [f"experiment.{key}={row[key]}" for key in keys if row[key]]
        alone = train(space, f"alone-{row['trial_id']}", "resources.workers=0", *point)
        searched = trial_history(tuned / "trials" / row["trial_id"])
        for ours, theirs in zip(searched, alone, strict=False):  # the scheduler may have stopped it
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3), row
            assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3), row


@pytest.mark.ray
def test_a_finished_search_is_shown_not_repeated(tuned, space, capsys):
    before = (tuned / "evaluation/test.json").stat().st_mtime_ns
    assert main(["tune", str(space)]) == 0
    assert "finished" in capsys.readouterr().out
    assert (tuned / "evaluation/test.json").stat().st_mtime_ns == before


@pytest.mark.ray
def test_another_configuration_under_the_same_name_is_refused(tuned, space, capsys):
    assert main(["tune", str(space), "experiment.patience=9"]) == 2
    assert "experiment.patience: 4 -> 9" in one_line(capsys)
    assert main(["tune", str(space), "experiment.epochs=1"]) == 2
    assert "experiment.epochs: 2 -> 1, which may only grow" in one_line(capsys)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_trained")
def test_a_random_split_is_stamped_leaky(space):
    overrides = ["experiment.protocol={scheme: random, folds: 3}", "tune.trials=1", "experiment.epochs=1"]
    assert main(["tune", str(space), "experiment.name=leaky", *overrides]) == 0
    results = results_of(space, "leaky")
    assert json.loads((results / "evaluation/test.json").read_text())["leaky"] is True
    assert json.loads((results / "audit.json").read_text())["leaky"] is True
    assert "LEAKY" in (results / "best/README.md").read_text()
    assert "LEAKY" in (results / "report.html").read_text()


@pytest.mark.ray
def test_a_second_opening_of_the_test_set_is_counted(tuned):
    assert main(["evaluate", str(tuned)]) == 0
    assert len(json.loads((tuned / "evaluation/test_openings.json").read_text())) == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_trained")
def test_a_finished_search_is_extended(tuned, space, capsys):
    """In a copy, as other tests look at the search of three trials."""
    copy_results(space, "tiny", "longer")
    before = {row["trial_id"]: row for row in csv.DictReader((tuned / "trials.csv").open())}
    evaluation = results_of(space, "longer") / "evaluation"
    chosen, opened = (json.loads((evaluation / f"{name}.json").read_text()) for name in ("choice", "test_openings"))
    assert main(["tune", str(space), "experiment.name=longer", "tune.trials=+1"]) == 0
    after = {row["trial_id"]: row for row in csv.DictReader((results_of(space, "longer") / "trials.csv").open())}
    assert after.keys() - before.keys() == {"004"}
    assert {trial_id: after[trial_id] for trial_id in before} == before
    capsys.readouterr()
    assert main(["tune", str(space), "experiment.name=longer"]) == 0, "fewer trials in the file than there are"
    assert "finished" in capsys.readouterr().out
    now, openings = (json.loads((evaluation / f"{name}.json").read_text()) for name in ("choice", "test_openings"))
    same = now["finalists"][0]["checkpoint"] == chosen["finalists"][0]["checkpoint"]
    assert len(openings) == len(opened) + (not same), "the test set stays closed where the choice is the same"
    assert openings[-1]["trial_id"] == now["trial_id"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_search_takes_more_epochs(tuned, space, capsys):
    results = results_of(space, "epochs")
    shutil.copytree(tuned, results)
    settings = results / "search.yaml"
    settings.write_text(settings.read_text().replace("name: tiny", "name: epochs"))
    before = {tried.trial_id: tried for tried in read_trials(results / "trials")}
    assert main(["tune", str(space), "experiment.name=epochs", "experiment.epochs=3"]) == 0
    assert "this search is finished" not in capsys.readouterr().out
    for tried in read_trials(results / "trials"):
        old = before[tried.trial_id]
        assert list(tried.history[: len(old.history)]) == list(old.history), "nothing is trained again"
        assert len(tried.history) == (3 if old.status == "finished" else len(old.history))
    assert json.loads((results / "evaluation/test.json").read_text())["budget"]["epochs"] == 3


@pytest.mark.ray
@pytest.mark.slow
def test_finalists_are_trained_over_folds_and_seeds(space, ray_cluster, capsys):
    own = ["tune.trials=2", "tune.finalists=2", "tune.final_folds=[0, 1]", "tune.final_seeds=2", "tune.scheduler=none"]
    own += ["tune.rotate_dev=true", "experiment.epochs=1"]
    arguments = ["tune", str(space), "experiment.name=finals", *own]
    assert main(arguments) == 0
    results = results_of(space, "finals")
    choice = json.loads((results / "evaluation/choice.json").read_text())
    for finalist in choice["finalists"]:
        pairs = [(run["fold"], run["seed"]) for run in finalist["runs"]]
        assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert finalist["dev_uar"] == pytest.approx(np.mean([run["dev_uar"] for run in finalist["runs"]]))
        assert pairs[0] == (0, 0)
        assert finalist["runs"][0]["checkpoint"].startswith("trials/"), "what the search finished is not trained again"
        for run in finalist["runs"]:
            experiment = config.load_experiment(results / run["checkpoint"] / "experiment.yaml")
            assert (experiment.protocol.fold, experiment.seed) == (run["fold"], run["seed"])
            assert experiment.protocol.dev_after == 1 + run["seed"]
    assert len(list((results / "finals").iterdir())) == 6
    assert {choice["against"]["trial_id"], choice["trial_id"]} == {"001", "002"}
    test = json.loads((results / "evaluation/test.json").read_text())
    assert test["n"] == 2 * 2 * 16, "two folds of 16 utterances, by two seeds"
    assert test["mean"]["uar"] == pytest.approx(np.mean([run["uar"] for run in test["runs"]]))
    assert 0 <= test["seeds_averaged"]["mean"]["uar"] <= 1
    probe = test["baselines"]["frozen backbone + linear"]
    gap = test["against"]["frozen backbone + linear"]["uar"]
    assert gap["difference"] == pytest.approx(test["seeds_averaged"]["uar"] - probe["uar"])
    speakers = {
        split: set(p.speakers) for split, p in read_predictions(results / "evaluation/predictions.parquet").items()
    }
    assert len(speakers["test"]) == 4
    assert len(speakers["dev"]) == 6, "two devs for each of two tested folds of two speakers: all three folds"
    capsys.readouterr()
    assert main(arguments) == 0
    assert "finished" in capsys.readouterr().out


def test_a_rerun_says_that_nothing_differs(space, local, capsys):
    assert main(["rerun", str(results_of(space, "local"))]) == 0
    said = capsys.readouterr().out
    assert "the data are the same: ravdess" in said
    assert "all metrics are the same" in said
    again = json.loads((results_of(space, "local-rerun") / "rerun.json").read_text())
    assert [row["difference"] for row in again["metrics"]] == [0.0]


def test_a_rerun_on_other_data_is_refused(space, local, tiny_corpus, tmp_path, capsys):
    shutil.copytree(tiny_corpus, tmp_path / "ravdess")
    next((tmp_path / "ravdess").rglob("*.wav")).unlink()
    other = f"experiment.corpora.ravdess={tmp_path / 'ravdess'}"
    assert main(["rerun", str(results_of(space, "local")), other, "experiment.name=other"]) == 2
    assert "are not those of that run" in one_line(capsys)


@pytest.mark.ray
def test_two_commands_do_not_work_on_one_search(space, ray_cluster, capsys):
    results_of(space, "busy").mkdir(parents=True)
    with disk.locked(results_of(space, "busy") / ".lock"):
        assert main(["tune", str(space), "experiment.name=busy"]) == 2
    assert "another process works on this; wait for it" in one_line(capsys)


@pytest.mark.ray
def test_the_winner_predicts_what_the_evaluation_said(tuned, tiny_corpus, capsys):
    test = read_predictions(tuned / "evaluation/predictions.parquet")["test"]
    capsys.readouterr()
    files = [next(tiny_corpus.rglob(f"{i.split('/')[1]}.wav")) for i in test.utterance_ids]
    assert main(["predict", str(tuned / "best"), *map(str, files), "--format", "jsonl"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = np.array([list(answer["probabilities"].values()) for answer in answers])
    np.testing.assert_allclose(given, test.probabilities, atol=1e-4)


@pytest.mark.ray
def test_predict_says_what_it_cannot_use(tuned, tiny_corpus, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(next(tiny_corpus.rglob("*.wav")), folder / "good.wav")
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(folder / "silent.flac", np.zeros(16_000), 16_000)
    out = tmp_path / "answers.csv"
    assert main(["predict", str(tuned / "best"), str(folder), "--format", "csv", "--output", str(out)]) == 1
    rows = {Path(row["path"]).name: row for row in csv.DictReader(out.open())}
    assert rows["good.wav"]["emotion"] in SPACE["experiment"]["emotions"]
    assert sum(float(v) for k, v in rows["good.wav"].items() if k.startswith("p_")) == pytest.approx(1)
    assert rows["broken.wav"]["reason"]
    assert rows["silent.flac"]["reason"]
    assert main(["predict", str(tuned / "best"), str(folder / "good.wav")]) == 0
    assert "good.wav" in capsys.readouterr().out
    for arguments in (
        ["predict", str(tuned / "best"), str(tmp_path / "absent.wav")],
        ["predict", str(tuned)],
        ["predict"],
    ):
        assert main(arguments) == 2


def test_an_interrupted_trial_continues_to_the_same_numbers(space, local, monkeypatch):
    def interrupt(record, metric):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ser_ray.train.folder.describe_epoch", interrupt)
        assert main(["train", str(space), "experiment.name=cut", "resources.workers=0"]) == 130
    assert len(trial_history(results_of(space, "cut") / "trials" / "single")) == 1
    continued = train(space, "cut", "resources.workers=0")
    same = ("epoch", "train_loss", "dev_loss", "dev_uar", "lr")
    assert [[r[key] for key in same] for r in continued] == [[r[key] for key in same] for r in local]


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "trained"), [(0, "local"), pytest.param(1, "worker", marks=pytest.mark.slow)])
def test_a_last_epoch_that_is_told_again_is_not_written_again(space, local, worker, workers, trained):
    """Who watched may have died before it heard; the trial is over all the same."""
    name = f"told-{workers}"
    history = copy_results(space, trained, name) / "trials" / "single" / "history.jsonl"
    before = history.read_bytes()
    train(space, name, f"resources.workers={workers}")
    assert history.read_bytes() == before


def one_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment.epochz=3"], ["experiment.epochz", "epochs"]),
        (["experiment.corpora.ravdess=/nowhere/at/all"], ["experiment.corpora.ravdess", "/nowhere/at/all"]),
        (["experiment.backbone=/nowhere/backbone"], ["/nowhere/backbone", "no such directory"]),
        (["experiment.backbone=openai/whisper-large-v9"], ["openai/whisper-large-v9", "hub"]),
        (["experiment.backbone=embedded/huge"], ["embedded/huge", "embedded/tiny-whisper"]),
        (["resources.cpus_per_worker=900"], ["900 CPUs", "resources"]),
        (["resources.workers=0"], ["resources.workers"]),
    ],
)
def test_what_cannot_work_is_one_line_before_any_trial(space, ray_cluster, overrides, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["tune", str(space), "experiment.name=never", *overrides]) == 2
    line = one_line(capsys)
    assert all(word in line for word in words), line
    assert not results_of(space, "never").exists()


@pytest.mark.ray
def test_a_corpus_with_one_speaker_is_refused(space, tiny_corpus, ray_cluster, tmp_path, capsys):
    shutil.copytree(tiny_corpus / "Actor_01", tmp_path / "one" / "Actor_01")
    corpus = f"experiment.corpora.ravdess={tmp_path / 'one'}"
    assert main(["tune", str(space), "experiment.name=never", corpus]) == 2
    assert "speaker" in one_line(capsys)
    assert not results_of(space, "never").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["{method: lora, rank: 2, first_layer: 1, dropout: 0.0}", "{method: frozen}"])
def test_training_on_what_frozen_layers_computed_gives_the_same_figures(space, ray_cluster, adapter, capsys):
    """Beside training on the speech itself; here, on Ray, and again from a checkpoint."""
    own = [f"experiment.adapter={adapter}", "experiment.backbone=embedded/tiny-whisper"]
    name = "cached-" + adapter.split()[1].strip(",}")
    plain = train(space, f"{name}-plain", *own, "resources.workers=0", "storage.prefix_gb=0")
    capsys.readouterr()
    here = train(space, f"{name}-here", *own, "resources.workers=0")
    assert "frozen prefix tiny-whisper below layer" in capsys.readouterr().out
    on_ray = train(space, f"{name}-ray", *own)
    for records in (here, on_ray):
        assert [r["epoch"] for r in records] == [r["epoch"] for r in plain]
        for record, expected in zip(records, plain, strict=True):
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
            assert record["dev_loss"] == pytest.approx(expected["dev_loss"], rel=0.02)
    # The checkpoint is a whole model: on the speech itself it gives what training said, and what was kept gives.
    best = max(on_ray, key=lambda r: (r["dev_uar"], -r["epoch"]))
    for source in ("what was kept", "the speech"):
        assert main(["evaluate", str(results_of(space, f"{name}-ray"))]) == 0
        dev = json.loads((results_of(space, f"{name}-ray") / "evaluation" / "dev.json").read_text())
        assert dev["uar"] == pytest.approx(best["dev_uar"], abs=0.07), source  # one of 16 may lie on the border
        shutil.rmtree(space.parent / "cache" / "prefix", ignore_errors=True)


def test_targets_that_do_not_exist_stop_the_run_in_one_line(space, capsys):
    arguments = ["experiment.name=targets", "resources.workers=0"]
    arguments += ["experiment.adapter={method: lora, rank: 2, targets: [query]}"]
    assert main(["train", str(space), *arguments]) == 2
    assert "adapter.targets: 'query' is not a linear layer" in one_line(capsys)


def test_a_results_folder_that_cannot_be_written_is_said(space, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["train", str(space), "resources.workers=0", f"storage.results={blocked}/results"]) == 2
    assert "storage.results" in one_line(capsys)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MB, smaller than a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_is_one_line(space, small_disk, capsys):
    arguments = ["train", str(space), "experiment.name=full", f"storage.results={small_disk}", "resources.workers=0"]
    assert main(arguments) == 2
    line = one_line(capsys)
    assert f"{small_disk}/full/trials/single" in line
    assert "No space left on device; make room" in line


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_ends_a_search_with_one_line(space, small_disk, ray_cluster, capsys):
    assert main(["tune", str(space), "experiment.name=full", f"storage.results={small_disk}"]) == 2
    assert "No space left on device; make room" in one_line(capsys)
    assert not list((small_disk / "full").glob("evaluation/*"))


def test_a_submitted_job_refuses_relative_paths(space, monkeypatch):
    from ser_ray.schema import UserError

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    settled = paths.resolve_paths(config.load(config.default_space()))
    assert settled.storage.results == str(Path.home() / "ser_ray" / "results")
    settled = paths.resolve_paths(config.load(config.default_space(), ["storage.prefix_gb=0"]))
    assert settled.storage.prefix_gb == 0, "what is no path is left alone"
    for override in ("storage.results=results", "storage.cache=cache", "experiment.corpora.ravdess=data/ravdess"):
        with pytest.raises(UserError, match="relative"):
            paths.resolve_paths(config.load(config.default_space(), [override]))


def test_backbones_beside_the_yaml_keep_their_conditions(space, tmp_path, monkeypatch):

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")  # by which a folder is told from a hub id
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(space.read_text())
    content["search"] = {
        "backbone": {"choice": ["mine", "embedded/tiny-whisper"]},
        "adapter.first_layer": {"choice": [0, 1], "when": {"backbone": ["mine"]}},
    }
    content["tune"] = {"first": [{"backbone": "mine", "adapter.first_layer": 1}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    settled = paths.resolve_paths(config.load(tmp_path / "space.yaml"))
    whole = str(tmp_path / "mine")
    assert settled.search["backbone"].choice == (whole, "embedded/tiny-whisper")
    assert settled.search["adapter.first_layer"].when == {"backbone": (whole,)}
    assert settled.tune.first == ({"backbone": whole, "adapter.first_layer": 1},)


def test_checkpoints_load_outside_of_the_search(space, local):
    best = results_of(space, "local") / "trials" / "single" / "epoch_002"
    model = checkpoint.load(best)
    assert not model.training
