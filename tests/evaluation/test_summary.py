"""The evaluation record holds plain JSON of the right figures; predictions come back as they were written."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

from ser_ray.evaluation.intervals import bootstrap_ci95
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.summary import read_predictions, summarise, write_predictions
from ser_ray.schema import UserError

EMOTIONS = ("angry", "happy", "neutral", "boredom")


def made_predictions(n=60, seed=0, emotions=EMOTIONS, speakers=5):
    """Predictions of which the last emotion never is the truth."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(emotions) - 1, n)
    logits = rng.standard_normal((n, len(emotions))) + 1.5 * np.eye(len(emotions))[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    corpora = tuple(("ravdess", "emodb")[i % speakers % 2] for i in range(n))
    return Predictions(
        emotions=emotions,
        utterance_ids=tuple(f"{corpora[i]}/{i:04}" for i in range(n)),
        corpora=corpora,
        speakers=tuple(f"{corpora[i]}/{i % speakers:02}" for i in range(n)),
        labels=labels,
        probabilities=probabilities,
    )


def test_summarise_is_plain_json_of_the_right_figures():
    predictions, protocol = made_predictions(), {"scheme": "speaker_kfold", "folds": 5}
    summary = summarise(predictions, protocol, leaky=False)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    labels, predicted = predictions.labels, predictions.predicted
    assert summary["n"] == 60
    assert summary["labels"] == list(EMOTIONS)
    assert summary["confusion"] == confusion_matrix(labels, predicted, labels=range(4)).tolist()
    assert summary["uar"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    limits, unit = bootstrap_ci95(labels, predicted, predictions.speakers, 4)
    assert summary["ci95"] == {name: list(limits[name]) for name in HEADLINE}
    assert summary["ci95_unit"] == unit == "speakers"
    recalls = recall_score(labels, predicted, labels=range(4), average=None, zero_division=0)
    assert [summary["per_emotion"][e]["recall"] for e in EMOTIONS] == pytest.approx(recalls.tolist())
    assert summary["per_emotion"]["boredom"]["n"] == 0
    assert (summary["protocol"], summary["leaky"]) == (protocol, False)


def test_groups_add_up():
    predictions = made_predictions()
    summary = summarise(predictions, {}, leaky=True)
    for groups, names in (("per_corpus", predictions.corpora), ("per_speaker", predictions.speakers)):
        assert list(summary[groups]) == sorted(set(names))
        hits = sum(g["n"] * g["accuracy"] for g in summary[groups].values())
        assert sum(g["n"] for g in summary[groups].values()) == 60
        assert hits / 60 == pytest.approx(summary["accuracy"])
    mine = np.array([s == "emodb/01" for s in predictions.speakers])
    expected = balanced_accuracy_score(predictions.labels[mine], predictions.predicted[mine])
    assert summary["per_speaker"]["emodb/01"]["uar"] == pytest.approx(expected)
    assert summary["leaky"] is True


def test_one_speaker_is_said():
    assert summarise(made_predictions(speakers=1), {}, leaky=False)["ci95_unit"] == "utterances"


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="the split is empty"):
        summarise(made_predictions(n=0), {}, leaky=False)


def test_probabilities_that_are_no_numbers_are_refused():
    predictions = made_predictions()
    predictions.probabilities[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 60 utterances"):
        summarise(predictions, {}, leaky=False)


def _assert_equal(one, other):
    assert (one.emotions, one.utterance_ids, one.corpora, one.speakers) == (
        other.emotions,
        other.utterance_ids,
        other.corpora,
        other.speakers,
    )
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_predictions_come_back_and_splits_live_side_by_side(tmp_path):
    path = tmp_path / "predictions.parquet"
    dev, test = made_predictions(seed=1), made_predictions(seed=2, n=7)
    write_predictions(made_predictions(seed=3), "dev", path)
    write_predictions(test, "test", path)
    write_predictions(dev, "dev", path)  # replaces the first one
    read = read_predictions(path)
    assert set(read) == {"dev", "test"}
    _assert_equal(read["dev"], dev)
    _assert_equal(read["test"], test)
    assert list(tmp_path.iterdir()) == [path]
    table = pq.read_table(path).to_pylist()
    assert table[0]["emotion"] == EMOTIONS[test.labels[0]]
    assert table[0]["predicted"] == EMOTIONS[test.predicted[0]]
    assert table[0]["p_happy"] == test.probabilities[0, 1]


def test_other_emotions_are_refused(tmp_path):
    path = tmp_path / "predictions.parquet"
    write_predictions(made_predictions(), "dev", path)
    with pytest.raises(UserError, match=r"boredom.*calm"):
        write_predictions(made_predictions(emotions=("angry", "happy", "calm")), "test", path)
    assert list(read_predictions(path)) == ["dev"]


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_predictions(tmp_path / "predictions.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"has columns \['x'\]"):
        read_predictions(tmp_path / "other.parquet")
