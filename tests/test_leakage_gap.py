"""The leakage gap: which runs it takes, how folds are pooled, and what it says where speakers give it away."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import stub_trainable
from sklearn.metrics import balanced_accuracy_score
from test_verbs import results_of, write_space

from ser_ray import config, leakage
from ser_ray.__main__ import main
from ser_ray.evaluation.predictions import Predictions
from ser_ray.schema import UserError


def predictions(right: float, seed: int = 0, speakers: int = 8) -> Predictions:
    """160 utterances of two corpora, of which a share is recognised."""
    rng = np.random.default_rng(seed)
    labels = np.arange(160) % 4
    guesses = np.where(rng.uniform(size=160) < right, labels, rng.integers(0, 4, 160))
    corpora = tuple("a" if n < 80 else "b" for n in range(160))
    return Predictions(
        ("angry", "fear", "happy", "sad"),
        tuple(f"{corpus}/{n:03d}" for n, corpus in enumerate(corpora)),
        corpora,
        tuple(f"{corpus}/s{n % speakers}" for n, corpus in enumerate(corpora)),
        labels,
        np.eye(4)[guesses],
    )


def part(whole: Predictions, rows: list[int]) -> Predictions:
    names = ("utterance_ids", "corpora", "speakers")
    columns = {name: tuple(getattr(whole, name)[row] for row in rows) for name in names}
    return replace(whole, **columns, labels=whole.labels[rows], probabilities=whole.probabilities[rows])


def test_folds_are_pooled_in_order():
    whole = predictions(0.5)
    order = np.random.default_rng(1).permutation(160).tolist()
    pooled = leakage.pool([part(whole, order[:50]), part(whole, order[50:])])
    assert pooled.utterance_ids == whole.utterance_ids
    assert pooled.speakers == whole.speakers
    assert np.array_equal(pooled.labels, whole.labels)
    assert np.array_equal(pooled.probabilities, whole.probabilities)
    with pytest.raises(AssertionError, match="twice"):
        leakage.pool([whole, part(whole, [3])])


def test_the_gap_is_that_of_the_figures_and_its_interval_leaves_out_nothing():
    leaky, fair = predictions(0.9, seed=1), predictions(0.4, seed=2)
    answer = leakage.compare({"random": leaky, "speaker_kfold": fair})
    assert set(answer["schemes"]["random"]) == {"all", "a", "b"}
    scores = [balanced_accuracy_score(p.labels, p.predicted) for p in (leaky, fair)]
    gap = answer["gaps"]["random"]["all"]["uar"]
    assert gap["value"] == pytest.approx(scores[0] - scores[1])
    assert 0 < gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    assert answer["gaps"]["speaker_kfold"]["a"]["uar"] == {"value": 0.0, "ci95": None, "p": None}
    found = answer["gaps"]["random"].values()
    assert all(one["uar"]["p"] <= one["uar"]["p_holm"] for one in found)
    assert min(one["uar"]["p_holm"] for one in found) == 3 * min(one["uar"]["p"] for one in found)
    assert json.loads(json.dumps(answer)) == answer


def test_one_speaker_is_refused():
    lonely = predictions(0.5, speakers=1)
    with pytest.raises(UserError, match="one speaker"):
        leakage.compare({"random": lonely, "speaker_kfold": lonely})


def test_the_runs_differ_in_the_protocol_alone(tmp_path, tiny_corpus):
    space = config.load(write_space(tmp_path, tiny_corpus))
    names = [name for name, _ in leakage.schemes(space)]
    assert names == [f"{scheme}-{fold}" for scheme in ("random", "speaker_kfold") for fold in range(3)]
    two = space.model_copy(
        update={"experiment": space.experiment.model_copy(update={"corpora": {"ravdess": "x", "synthetic": None}})}
    )
    assert [name for name, _ in leakage.schemes(two)][6:] == ["without-ravdess", "without-synthetic"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_leakage_gap_of_a_small_corpus(tmp_path, tiny_corpus, tiny_cache, ray_cluster, capsys, monkeypatch):
    """Of models that learned nothing: what is compared is compared in the same way."""
    monkeypatch.setattr("ser_ray.train.fit_on_ray", partial(stub_trainable.fit, callback=lambda line: None))
    space = write_space(tmp_path, tiny_corpus, tiny_cache)
    command = ["leakage", str(space), "experiment.name=gap", "experiment.epochs=1"]
    assert main(command) == 0
    answer = json.loads((results_of(space, "gap") / "leakage.json").read_text())
    assert set(answer["schemes"]) == {"random", "speaker_kfold"}
    assert {groups["all"]["n"] for groups in answer["schemes"].values()} == {48}
    assert "leakage gap" in capsys.readouterr().out
    assert main(["premium", *command[1:]]) == 0, "finished runs are read, not repeated"
    said = capsys.readouterr()
    assert "training" not in said.out
    assert "ser-ray premium is called ser-ray leakage now" in said.err
