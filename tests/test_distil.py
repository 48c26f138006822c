"""A student of a search's winner: what is refused in one line, what it costs, and a whole small run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from backbone_fixtures import experiment, noise_batch
from test_verbs import write_space

from ser_ray import config, disk, distil
from ser_ray.__main__ import main
from ser_ray.config import SearchSpace
from ser_ray.evaluation import student as beside_teacher
from ser_ray.evaluation.card import model_card
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.results import TEACHER, read_results
from ser_ray.evaluation.summary import read_predictions, summarise, write_predictions
from ser_ray.evaluation.verdicts import against_teacher
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.protocols.task import Task
from ser_ray.schema import UserError
from ser_ray.training.cost import cost_of

EMOTIONS = ("angry", "fear", "happy", "sad")


def predictions(seed: int, n: int = 40) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    logits = rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels]
    return Predictions(
        EMOTIONS,
        tuple(f"mine/{i:02}" for i in range(n)),
        ("mine",) * n,
        tuple(f"mine/{i % 5}" for i in range(n)),
        labels,
        np.exp(logits) / np.exp(logits).sum(-1, keepdims=True),
    )


def write_results(directory: Path, backbone: Path, name: str, draw: int, **sections: object) -> Path:
    """A results folder as an evaluation leaves it, with an untrained best/."""
    described = experiment(backbone, EMOTIONS, corpora={"mine": str(directory / "mine.csv")}, **sections)
    described = described.model_copy(update={"name": name})
    space = SearchSpace.model_validate({"experiment": config.to_dict(described)})
    home, own = directory / name, predictions(draw)
    disk.write_text(home / "search.yaml", config.dump(space))
    disk.write_text(directory / "mine.csv", "path,speaker,emotion\n")
    disk.write_json(home / "provenance.json", {"data": [{"corpus": "mine", "directory": "x", "fingerprint": "y"}]})
    checkpoint.save(build(described), home / "best", {"epoch": 1})
    metrics = summarise(own, {"description": "five speakers"}, False)
    run = {key: metrics[key] for key in ("n", "uar", "accuracy", "macro_f1", "weighted_f1", "kappa")}
    disk.write_json(home / "evaluation" / "test.json", metrics | {"runs": [run | {"checkpoint": "trials/1/epoch_001"}]})
    write_predictions(own, "test", home / "evaluation" / "predictions.parquet")
    return home


@pytest.fixture(scope="module")
def teacher(backbones_dir, tmp_path_factory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), backbones_dir / "whisper", "big", 0, seed=3)


def refused(capsys, *arguments: object) -> str:
    assert main(["distil", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experiment.emotions=[angry, sad]", "experiment.emotions: a student has that of its teacher"),
        ("experiment.protocol.folds=3", "experiment.protocol: a student has that of its teacher"),
        ("experiment.corpora.other=x.csv", "experiment.corpora: a student has that of its teacher"),
        ("experiment.audio.trim_db=null", "experiment.audio: a student has that of its teacher"),
        ("tune.trials=3", "a student is one trial"),
        ("resources.workers=0", "set resources.workers=1"),
    ],
)
def test_a_student_of_other_data_is_refused_in_one_line(teacher, capsys, override, said):
    assert said in refused(capsys, teacher, "--student", "embedded/tiny-whisper", override)


def test_a_student_has_the_data_the_fold_and_the_seed_of_its_teacher(teacher):
    known = distil.read_teacher(teacher)
    space = distil.student_space(
        known, "embedded/tiny-whisper", ["experiment.epochs=3", "experiment.distil.temperature=4"]
    )
    own, theirs = space.experiment, known.experiment
    assert own.name == "big-tiny-whisper"
    assert (own.adapter.method, own.epochs, own.distil.temperature) == ("full", 3, 4.0)
    for key in ("emotions", "corpora", "protocol", "audio", "seed"):
        assert getattr(own, key) == getattr(theirs, key)
    assert space.results_dir() == teacher.parent / "big-tiny-whisper"


def test_a_large_student_is_refused_with_its_size(teacher, capsys, monkeypatch):
    monkeypatch.setattr(distil, "MOST_PARAMETERS", 1000)
    line = refused(capsys, teacher, "--student", "embedded/tiny-whisper")
    assert "--student: embedded/tiny-whisper has " in line
    assert "million parameters with its head; a student has at most" in line


@pytest.mark.parametrize("name", ["embedded/tiny-whisper", "embedded/tiny-wav2vec2"])
def test_the_embedded_backbones_are_small_enough(teacher, name):
    distil.check_size(distil.student_space(distil.read_teacher(teacher), name, []).experiment)


def test_a_search_without_a_winner_cannot_teach(teacher, tmp_path, capsys):
    home = shutil.copytree(teacher, tmp_path / "big")
    shutil.rmtree(home / "best")
    assert "it has no evaluated best/ yet" in refused(capsys, home, "--student", "embedded/tiny-whisper")


def test_a_teacher_without_its_speech_is_refused(teacher, tmp_path, capsys):
    home = shutil.copytree(teacher, tmp_path / "big")
    text = (home / "best" / "experiment.yaml").read_text()
    (home / "best" / "experiment.yaml").write_text(text.replace(str(teacher.parent / "mine.csv"), "/gone/mine.csv"))
    line = refused(capsys, home, "--student", "embedded/tiny-whisper")
    assert line == (
        "ser-ray distil: experiment.corpora.mine: /gone/mine.csv: no such directory; set it to where the corpus is"
    )


def test_a_teacher_that_heard_the_tested_is_refused(teacher, monkeypatch):
    """The teacher was tested on other utterances; and on the same, but trained on one of their speakers."""
    known, own = distil.read_teacher(teacher), predictions(0)

    def task(ids: list[str], split: list[str], speakers: list[str]) -> Task:
        index = pa.table({"utterance_id": ids, "label": [0] * len(ids), "split": split, "speaker": speakers})
        return Task(EMOTIONS, index, "", False, False)

    others = task(["mine/x"], ["test"], ["mine/9"])
    with pytest.raises(
        UserError, match="was tested on 40 utterances and the student would be on 1, 0 of them the same"
    ):
        distil.check_unheard(known, others, [])
    same = task([*own.utterance_ids, "a"], ["test"] * 40 + ["train"], [*own.speakers, "mine/9"])
    monkeypatch.setattr(distil, "write_fold", lambda *args: Path())
    monkeypatch.setattr(Task, "read", classmethod(lambda cls, path: same))
    distil.check_unheard(known, same, [])
    heard = task([*own.utterance_ids, "a"], ["test"] * 40 + ["train"], [*own.speakers, "mine/2"])
    monkeypatch.setattr(Task, "read", classmethod(lambda cls, path: heard))
    with pytest.raises(UserError, match="trained on mine/2, whom the student is tested on"):
        distil.check_unheard(known, same, [])
    distil.check_unheard(known, replace(same, leaky=True), [])


def test_the_digest_of_a_teacher_is_that_of_its_weights(teacher, tmp_path):
    home = shutil.copytree(teacher, tmp_path / "big")
    before = distil.read_teacher(home).digest
    assert before == distil.read_teacher(teacher).digest
    model = checkpoint.load(home / "best")
    with torch.no_grad():
        next(model.head.parameters()).add_(1e-3)
    checkpoint.save(model, home / "best", {"epoch": 1})
    assert distil.read_teacher(home).digest != before


def test_costs_are_those_of_the_whole_model(backbones_dir):
    """Against a plain count; of 4 bits the parameters stay as many, and the megabytes fall."""
    whole = build(experiment(backbones_dir / "whisper"))
    batch = noise_batch([0.5])
    cost = cost_of(whole, [batch, batch])
    counted = sum(p.numel() for p in whole.backbone.parameters()) + sum(p.numel() for p in whole.head.parameters())
    assert cost.parameters == counted
    assert cost.megabytes == pytest.approx(4 * (counted + sum(b.numel() for b in whole.buffers())) / 1e6, rel=0.05)
    assert cost.utterances == 2
    assert cost.milliseconds > 0
    plain, packed = (
        build(experiment(backbones_dir / "whisper", adapter={"method": method, "rank": 4}))
        for method in ("lora", "qlora")
    )
    assert cost_of(packed, [batch]).parameters == cost_of(plain, [batch]).parameters
    assert cost_of(packed, [batch]).megabytes < cost_of(plain, [batch]).megabytes


COST = {"parameters": 1_500_000, "megabytes": 6.0, "milliseconds": 4.0, "utterances": 16}


def test_a_student_is_compared_with_its_teacher_on_the_same_utterances(teacher, backbones_dir, tmp_path):
    settings = {"answers": "/x.parquet", "teacher": "big-0123"}
    home = write_results(tmp_path, backbones_dir / "whisper", "small", 1, distil=settings)
    costs = {"student": COST, "teacher": COST | {"parameters": 20_000_000}}
    record = beside_teacher.record_of(read_results(home), read_results(teacher), costs)
    one, other = predictions(1), predictions(0)
    recalls = [[float((p.predicted[p.labels == k] == k).mean()) for k in range(4)] for p in (one, other)]
    expected = np.mean(recalls[0]) - np.mean(recalls[1])
    assert record["against"]["uar"]["difference"] == pytest.approx(expected)
    assert record["test"]["teacher"]["uar"] == pytest.approx(np.mean(recalls[1]))
    disk.write_json(home / TEACHER, record)
    gap, cost = against_teacher(read_results(home))
    assert "its teacher big-0123" in gap
    assert f"({np.mean(recalls[0]):.3f} and {np.mean(recalls[1]):.3f})" in gap
    assert "It has 1.50 million parameters, 6.0 MB and 4.0 ms an utterance; its teacher has 20.00 million" in cost
    assert against_teacher(read_results(teacher)) == []
    test = json.loads((home / "evaluation" / "test.json").read_text())
    card = model_card(config.load_experiment(home / "best" / "experiment.yaml"), test, test, "uar")
    assert "trained on the probabilities that its teacher, big-0123, gives" in card
    probe = test | {"runs": [test["runs"][0] | {"checkpoint": "trials/1/epoch_000"}]}
    described = config.load_experiment(home / "best" / "experiment.yaml")
    assert "Distilled" not in model_card(described, test, probe, "uar"), "a probe has not seen its teacher"


@pytest.mark.ray
@pytest.mark.slow
def test_a_student_is_distilled_with_a_folder_without_labels(ray_cluster, tiny_corpus, tiny_cache, tmp_path, capsys):
    space = write_space(tmp_path, tiny_corpus, tiny_cache)
    short = ["search={}", "tune={trials: 1}", "experiment.epochs=1", "experiment.adapter={method: frozen}"]
    assert main(["tune", str(space), *short, "experiment.head.init=probe"]) == 0
    calls = tmp_path / "calls"
    calls.mkdir()
    rng = np.random.default_rng(0)
    for n in range(5):
        soundfile.write(calls / f"{n}.wav", 0.1 * rng.standard_normal(12_000 + 1000 * n), 16_000)
    results = tmp_path / "results" / "tiny"
    student = ["distil", str(results), "--student", "embedded/tiny-whisper", "--speech", str(calls)]
    capsys.readouterr()
    assert main([*student, "experiment.epochs=2", "experiment.batch_seconds=8"]) == 0
    said = capsys.readouterr().out
    assert "its teacher tiny-" in said
    home = tmp_path / "results" / "tiny-tiny-whisper"
    resolved = config.load(home / "search.yaml").experiment
    own, theirs = (read_predictions(path / "evaluation" / "predictions.parquet")["test"] for path in (home, results))
    assert own.utterance_ids == theirs.utterance_ids
    assert len(json.loads((home / "evaluation" / "test_openings.json").read_text())) == 1
    assert len(json.loads((results / "evaluation" / "test_openings.json").read_text())) == 1, "not opened again"
    record = json.loads((home / "evaluation" / "teacher.json").read_text())
    assert record["against"]["uar"]["difference"] == pytest.approx(
        record["test"]["student"]["uar"] - record["test"]["teacher"]["uar"]
    )
    assert record["costs"]["student"]["parameters"] < 2_000_000
    assert "its teacher tiny-" in (home / "report.html").read_text()
    assert "Distilled:" in (home / "best" / "README.md").read_text()
    answers = pq.read_table(resolved.distil.answers)
    (fold,) = [
        t for p in (home / "folds").glob("*.parquet") if (t := Task.read(p)).rows("train").num_rows == answers.num_rows
    ]
    assert set(fold.labels("train")) == set(answers["utterance_id"].to_pylist())
    assert sum(name.startswith("unlabelled/") for name in fold.labels("train")) == 5
    teacher = checkpoint.load(results / "best")
    assert resolved.distil.teacher == distil.read_teacher(results).name
    rows = np.stack([answers[f"p_{emotion}"].to_numpy() for emotion in teacher.experiment.emotions], 1)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-9)
    assert main([*student, "experiment.epochs=2", "experiment.batch_seconds=8"]) == 0, "again: what is there is shown"
    assert "answers is known" in capsys.readouterr().out
