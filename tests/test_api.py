"""The project from Python: predictions of files and arrays, results as tables, a search; its import is light."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from backbone_fixtures import experiment
from report_fixtures import write_search

import ser_ray
from ser_ray import api, config
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.summary import write_predictions
from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.schema import UserError

DOZEN = """
import numpy as np
import ser_ray

small = {{"experiment.epochs": 1, "experiment.batch_seconds": 20, "tune.trials": 1, "tune.finalists": 1}}
data = {{"experiment.corpora": {{"ravdess": "{corpus}"}}, "experiment.protocol.folds": 3}}
results = ser_ray.search("demo", **small, **data, storage__results="{results}", storage__cache="{cache}")
frame = results.metrics.to_pandas()
model = ser_ray.load(results.best)
tone = 0.3 * np.sin(2 * np.pi * 200 * np.arange(16_000) / 16_000)
rows = model.predict(tone, sampling_rate=16_000).to_pandas()
print("UAR", frame["uar"][0], "predicted", rows["emotion"][0])
"""


def test_the_import_is_light():
    script = (
        "import sys, ser_ray; dir(ser_ray); ser_ray.load; "
        "print(sorted({'torch', 'ray', 'numpy', 'pandas', 'pyarrow', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ser_ray.lode  # type: ignore[attr-defined]


def test_every_public_name_says_what_it_is_for():
    for name in ser_ray.__all__:
        assert getattr(ser_ray, name).__doc__, name
    assert (Path(ser_ray.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def model(backbones_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "best"
    checkpoint.save(build(experiment(backbones_dir / "whisper", ("angry", "happy", "sad"))), directory, {"epoch": 0})
    return ser_ray.load(directory, device="cpu")


@pytest.fixture(scope="module")
def recording(tiny_corpus):
    return min(tiny_corpus.rglob("*.wav"))


def test_files_folders_and_arrays_are_predicted_alike(model, recording, tmp_path):
    samples, rate = soundfile.read(recording, dtype="float32")
    integers, _ = soundfile.read(recording, dtype="int16")
    (by_file,) = model.predict(recording)
    assert list(by_file) == ["path", "start", "end", "emotion", "p_angry", "p_happy", "p_sad", "reason"]
    assert by_file["path"] == str(recording)
    assert sum(by_file[f"p_{emotion}"] for emotion in model.emotions) == pytest.approx(1)
    assert by_file["emotion"] == max(model.emotions, key=lambda emotion: by_file[f"p_{emotion}"])
    for row in model.predict([samples, integers, integers.astype(np.int32) << 16], sampling_rate=rate):
        assert row["path"] is None
        for emotion in model.emotions:
            assert row[f"p_{emotion}"] == pytest.approx(by_file[f"p_{emotion}"], abs=1e-4)
    (tmp_path / "again.wav").write_bytes(recording.read_bytes())
    assert model.predict([str(tmp_path)]).to_pandas()["emotion"].tolist() == [by_file["emotion"]]


def test_what_cannot_be_used_has_a_reason_and_leaves_its_place(model, recording):
    samples, rate = soundfile.read(recording, dtype="float32")
    given = [
        np.zeros(16_000),
        samples,
        np.zeros((2, 100)),
        np.full(16_000, np.nan),
        samples[len(samples) // 2 :][:800],
        np.zeros(0),
    ]
    rows = list(model.predict(given, sampling_rate=rate))
    assert rows[1]["reason"] is None
    for place, words in ((0, "silent"), (2, "one channel"), (3, "not finite"), (4, "too short"), (5, "empty")):
        assert words in rows[place]["reason"]
        assert rows[place]["emotion"] is None
    (refused,) = model.predict(samples, sampling_rate=10)
    assert "a sampling rate of 10 Hz" in refused["reason"]
    embedding = model.embed(given, sampling_rate=rate)
    assert np.isfinite(embedding).all(1).tolist() == [False, True, False, False, False, False]
    np.testing.assert_allclose(embedding[1], model.embed(samples, sampling_rate=rate)[0], atol=1e-4)


def test_an_embedding_is_what_the_classifier_sees(model, recording):
    import torch

    embedding_1P = torch.from_numpy(model.embed(recording))
    with torch.inference_mode():
        probabilities_K = model.classifier.head.classify(embedding_1P).softmax(-1)[0]
    (row,) = model.predict(recording)
    assert [row[f"p_{emotion}"] for emotion in model.emotions] == pytest.approx(probabilities_K.tolist(), abs=1e-5)


def test_what_is_asked_wrongly_is_refused(model, tmp_path):
    with pytest.raises(UserError, match="sampling_rate is missing"):
        model.predict(np.zeros(100))
    with pytest.raises(UserError, match="no such file or folder"):
        model.predict(tmp_path / "nothing.wav")
    with pytest.raises(UserError, match="not a results folder"):
        ser_ray.read_results(tmp_path)
    with pytest.raises(UserError, match=r"adapter\.ranc: unknown key; did you mean rank"):
        ser_ray.audit_data("demo", experiment__adapter__ranc=4)
    assert len(model.predict([])) == 0
    for wrong in ([0.1, 0.2], 3, [[0.1, 0.2]]):
        with pytest.raises(UserError, match="a recording is a path or a numpy array"):
            model.predict(wrong, sampling_rate=16_000)
    with pytest.raises(UserError, match="workers: 0 runs one trial without Ray"):
        ser_ray.search("demo", resources__workers=0)


def test_overrides_are_values_of_python(tmp_path):
    odd = tmp_path / "a #b: c \U0001f600"
    given = {"storage__results": odd, "experiment__epochs": np.int64(3), "experiment.corpora": {"ravdess": odd}}
    path, text = api._given("demo", given)
    space = config.load(path, text)
    assert space.storage.results == str(odd)
    assert space.experiment.corpora == {"ravdess": str(odd)}
    assert space.experiment.epochs == 3


def test_results_are_tables(tmp_path):
    folder = write_search(tmp_path / "results")
    results = ser_ray.read_results(folder)
    with (folder / "trials.csv").open() as file:
        known = {row["trial_id"]: row for row in csv.DictReader(file)}
    trials = results.trials.to_pandas()
    assert set(trials["trial_id"]) == set(known)
    metric = [value for value in trials["dev_uar"] if value == value]
    assert metric == sorted(metric, reverse=True)
    for row in results.trials:
        assert row["dev_uar"] == (float(known[row["trial_id"]]["dev_uar"] or "nan") if row["dev_uar"] else None)
    assert results.epochs.to_arrow().num_rows == sum(map(len, results.content.histories.values()))
    assert results.best == folder.resolve() / "best"
    with pytest.raises(UserError, match="no predictions of train; there are"):
        results.predictions("train")


def test_predictions_are_a_table_of_utterances(tmp_path):
    folder = write_search(tmp_path / "results")
    (folder / "evaluation").mkdir(exist_ok=True)
    made = Predictions(("sad", "angry"), ("c/1",), ("c",), ("c/s",), np.array([1]), np.array([[0.75, 0.25]]))
    write_predictions(made, "dev", folder / "evaluation" / "predictions.parquet")
    (row,) = ser_ray.read_results(folder).predictions("dev")
    text = {"utterance_id": "c/1", "corpus": "c", "speaker": "c/s", "emotion": "angry", "predicted": "sad"}
    assert list(row.items()) == [*text.items(), ("p_sad", 0.75), ("p_angry", 0.25)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_dozen_lines_train_read_and_predict(tmp_path, tiny_corpus):
    script = DOZEN.format(corpus=tiny_corpus, results=tmp_path / "results", cache=tmp_path / "cache")
    assert len([line for line in script.splitlines() if line]) <= 12
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.strip().splitlines()[-1].split()
    results = ser_ray.read_results(tmp_path / "results" / "demo")
    assert float(said[1]) == pytest.approx(results.content.test["uar"])
    assert said[-1] in results.content.test["labels"]
    predictions = results.predictions("test").to_pandas()
    assert len(predictions) == results.content.test["n"]
    right = (predictions["emotion"] == predictions["predicted"]).mean()
    assert right == pytest.approx(results.content.test["accuracy"])
    metrics = {row["name"]: row for row in results.metrics}
    assert [metrics["test"]["uar_low"], metrics["test"]["uar_high"]] == results.content.test["ci95"]["uar"]
    assert metrics["chance"]["uar_low"] is None
