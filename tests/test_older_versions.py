"""What version 0.1.0 left is read: a results folder and its checkpoint, made by its own code over the tiny corpus.

Of tests/fixtures/results-0.1.0 only pictures, the page and the checkpoints of the single trials were left out, and its
paths were replaced. The command: ``python -m ser_ray.tune search_spaces/demo.yaml experiment.protocol.folds=3
experiment.backbone=embedded/tiny-whisper experiment.adapter.rank=1 experiment.adapter.targets=[fc1]
experiment.adapter.first_layer=3 experiment.epochs=1 tune.trials=2 tune.finalists=1 ...``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import ser_ray
from ser_ray import report
from ser_ray.disk import read_json
from ser_ray.evaluation import folder

OLD = Path(__file__).resolve().parent / "fixtures" / "results-0.1.0"


def test_its_results_are_read():
    assert read_json(OLD / "provenance.json")["version"] == "0.1.0"
    results = ser_ray.read_results(OLD)
    test = read_json(OLD / "evaluation" / "test.json")
    (row,) = [row for row in results.metrics if row["name"] == "test"]
    assert (row["uar"], [row["uar_low"], row["uar_high"]]) == (test["uar"], test["ci95"]["uar"])
    assert [row["trial_id"] for row in results.trials] == [
        t.trial_id for t in sorted(folder.read_trials(OLD / "trials"), key=lambda trial: -trial.best["dev_uar"])
    ]
    assert len(results.predictions("test")) == test["n"]
    epochs = results.epochs.to_pandas()
    assert epochs["epoch"].tolist() == [0, 1, 0, 1]
    assert epochs["lr"].isna().tolist() == [True, False, True, False], "epoch 0, the probe, has no learning rate"


def test_its_report_is_built(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    page = report.build(tmp_path / "old", audio=False)
    assert f"{read_json(OLD / 'evaluation' / 'test.json')['uar']:.3f}" in page.read_text()


def test_its_checkpoint_predicts_what_it_predicted(tiny_corpus):
    """The utterances of the tiny corpus, from their files, beside the predictions that 0.1.0 stored."""
    stored = ser_ray.read_results(OLD).predictions("test").to_pandas().set_index("utterance_id")
    files = {f"ravdess/{path.stem}": path for path in tiny_corpus.rglob("*.wav")}
    model = ser_ray.load(OLD / "best", device="cpu")
    found = model.predict([files[utterance_id] for utterance_id in stored.index]).to_pandas()
    columns = [f"p_{emotion}" for emotion in model.emotions]
    np.testing.assert_allclose(found[columns].to_numpy(), stored[columns].to_numpy(), atol=5e-3)
    assert (found["emotion"].to_numpy() == stored["predicted"].to_numpy()).mean() == pytest.approx(1, abs=0.05)
