"""A search that ends with an ensemble in best/: chosen on dev, tested once, predicting the product of its members."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from test_verbs import write_space

import ser_ray
from ser_ray import config
from ser_ray.__main__ import main
from ser_ray.evaluation import ensemble, layout
from ser_ray.evaluation.ensemble import Candidate, Member
from ser_ray.evaluation.summary import read_predictions
from ser_ray.models import checkpoint
from ser_ray.training.inference import predict

pytestmark = [pytest.mark.ray, pytest.mark.slow]

POINTS = (
    {"head.pooling": "mean", "head.layer_mix": "last"},
    {"head.pooling": "statistics", "head.layer_mix": "concat"},
    {"head.pooling": "statistics", "head.layer_mix": "weighted"},
)
"""Three shapes, and so three models: what is not trained differs by its shape alone."""


def two(candidates: Sequence[Candidate], rounds: int, metric: str) -> list[Member]:
    """The first two candidates as an ensemble."""
    return [Member(candidates[0], 0.75), Member(candidates[1], 0.25)]


@pytest.fixture(scope="module")
def searched(tiny_corpus, tiny_cache, untrained, ray_cluster, tmp_path_factory) -> Path:
    """The results of a search of three untrained models over two folds. What dev would choose is said in its place, as
    of untrained models none is better than another: two members, and that they are better together."""
    path = write_space(tmp_path_factory.mktemp("ensemble"), tiny_corpus, tiny_cache)
    space = yaml.safe_load(path.read_text())
    space["experiment"]["adapter"] = {"method": "frozen"}
    space["search"] = {"head.pooling": {"choice": ["mean", "statistics"]}}
    space["search"]["head.layer_mix"] = {"choice": ["last", "concat", "weighted"]}
    space["tune"] = {"trials": 3, "finalists": 3, "scheduler": "none", "first": list(POINTS)}
    space["tune"] |= {"final_folds": [0, 1], "ensemble": 4}
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    with pytest.MonkeyPatch.context() as patched:
        import stub_trainable

        patched.setenv("SER_RAY_TRAINABLE", stub_trainable.TRAINABLE)
        held_out = ensemble.held_out
        patched.setattr(ensemble, "select", two)
        patched.setattr(ensemble, "held_out", lambda *given: (held_out(*given)[0], 0.999))
        assert main(["tune", str(path)]) == 0
    return path.parent / "results" / "tiny"


def test_best_is_an_ensemble_of_one_fold(searched):
    record = json.loads((searched / "evaluation/ensemble.json").read_text())
    content = json.loads((searched / "best/ensemble.json").read_text())
    assert record["used"]
    assert len(content["members"]) > 1
    assert sum(member["weight"] for member in content["members"]) == pytest.approx(1)
    folds = set()
    for member in content["members"]:
        source, copied = searched / member["checkpoint"], searched / "best" / member["directory"]
        assert (source / "head.safetensors").read_bytes() == (copied / "head.safetensors").read_bytes()
        folds.add(checkpoint.config.load_experiment(copied / "experiment.yaml").protocol.fold)
        assert not (copied / "training").exists()
    assert folds == {0}, "a run of another fold was trained on what is dev or test here"
    files = {path.relative_to(searched).as_posix() for path in searched.rglob("*") if path.is_file()}
    assert [name for name in files if not layout.describe(name)] == []


def test_predict_equals_the_product_by_hand(searched, tiny_corpus, capsys):
    """Of what every member says by itself, and the evaluation says the same of test."""
    content = json.loads((searched / "best/ensemble.json").read_text())
    files = {f"ravdess/{path.stem}": path for path in tiny_corpus.rglob("*.wav")}
    test = read_predictions(searched / "evaluation/predictions.parquet")["test"]
    rows = range(len(test) // 2)  # the first fold's, which best/ is of
    paths = [files[test.utterance_ids[row]] for row in rows]
    capsys.readouterr()
    assert main(["predict", str(searched / "best"), *map(str, paths), "--format", "jsonl"]) == 0
    found = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    logarithms = 0.0
    for member in content["members"]:
        model = checkpoint.load(searched / "best" / member["directory"])
        assert model.temperature == pytest.approx(member["temperature"])
        own = np.array([list(answer.probabilities.values()) for answer in predict(model, paths)])
        logarithms = logarithms + member["weight"] * np.log(own)
    expected = np.exp(logarithms / content["temperature"])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose([list(one.values()) for one in found], expected, atol=1e-6)
    np.testing.assert_allclose(expected, test.probabilities[: len(test) // 2], atol=1e-4)
    by_python = ser_ray.load(searched / "best", device="cpu").predict(paths[:2])
    assert [row["p_sad"] for row in by_python] == pytest.approx([one["sad"] for one in found[:2]], abs=1e-6)


def test_it_is_tested_once_beside_the_best_single_model(searched):
    (opening,) = json.loads((searched / "evaluation/test_openings.json").read_text())
    assert opening["trial_id"] == "ensemble"
    test = json.loads((searched / "evaluation/test.json").read_text())
    single = json.loads((searched / "evaluation/choice.json").read_text())["trial_id"]
    name = f"best single model, trial {single}"
    gap = test["against"][name]["uar"]
    assert gap["difference"] == pytest.approx(test["uar"] - test["baselines"][name]["uar"])
    assert [run["fold"] for run in test["runs"]] == [0, 1]
    assert all(" + " in run["checkpoint"] for run in test["runs"])


def test_costs_are_stated_in_card_and_report(searched, capsys):
    costs = json.loads((searched / "evaluation/ensemble.json").read_text())["costs"]
    content = json.loads((searched / "best/ensemble.json").read_text())
    models = [checkpoint.load(searched / "best" / member["directory"]) for member in content["members"]]
    assert costs["ensemble"]["parameters"] == sum(p.numel() for model in models for p in model.parameters())
    assert costs["ensemble"]["milliseconds"] > 0
    said = f"{costs['ensemble']['parameters'] / 1e6:.1f} M parameters"
    assert said in (searched / "best/README.md").read_text()
    assert said in (searched / "report.html").read_text()
    assert main(["report", str(searched), "--no-audio"]) == 0
    assert f"an ensemble of {len(models)} models" in " ".join(capsys.readouterr().out.split())


def test_an_ensemble_teaches_a_student(searched, tiny_corpus):
    """The student learns what `predict` of the ensemble answers, and costs less than its members together."""
    short = ["experiment.epochs=1", "experiment.batch_seconds=8"]
    assert main(["distil", str(searched), "--student", "embedded/tiny-whisper", *short]) == 0
    home = searched.parent / "tiny-tiny-whisper"
    answers = pq.read_table(config.load(home / "search.yaml").experiment.distil.answers).slice(0, 5).to_pylist()
    files = {f"ravdess/{path.stem}": path for path in tiny_corpus.rglob("*.wav")}
    heard = ser_ray.load(searched / "best", device="cpu").predict([files[row["utterance_id"]] for row in answers])
    for row, expected in zip(answers, heard, strict=True):
        assert [row[name] for name in row if name != "utterance_id"] == pytest.approx(
            [expected[name] for name in row if name != "utterance_id"], abs=1e-5
        )
    costs = json.loads((home / "evaluation/teacher.json").read_text())["costs"]
    content = json.loads((searched / "best/ensemble.json").read_text())
    models = [checkpoint.load(searched / "best" / member["directory"]) for member in content["members"]]
    assert costs["teacher"]["parameters"] == sum(p.numel() for model in models for p in model.parameters())


def test_the_same_search_without_it_is_the_best_single_model(searched, capsys):
    """``tune.ensemble`` may change: dev decides again, and the test set is opened for the model that it chooses."""
    space = searched.parent.parent / "space.yaml"
    assert main(["tune", str(space), "tune.ensemble=0"]) == 0
    assert not (searched / "best/ensemble.json").exists()
    assert (searched / "best/head.safetensors").is_file()
    openings = json.loads((searched / "evaluation/test_openings.json").read_text())
    single = json.loads((searched / "evaluation/choice.json").read_text())["trial_id"]
    assert [opening["trial_id"] for opening in openings] == ["ensemble", single]
    assert not ser_ray.read_results(searched).content.ensemble
