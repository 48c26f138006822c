"""What is written about the choice and the test, from predictions that are made here: no model, no Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import recall_score

from ser_ray.config import Audio, SearchSpace
from ser_ray.evaluation import ensemble
from ser_ray.evaluation.folder import TrialRecord
from ser_ray.evaluation.predictions import Predictions
from ser_ray.evaluation.record import Record
from ser_ray.evaluation.runs import Run
from ser_ray.protocols.folds import counted_emotions
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime.scorer import _predictions
from ser_ray.runtime.scoring import PROBE
from ser_ray.speech import shards

EMOTIONS = ("angry", "happy", "neutral", "sad")
HAS = {"ravdess": ("angry", "happy", "sad"), "emodb": ("angry", "neutral", "sad")}
"""Angry and sad are common; neutral and happy are on one side each."""
SHARDS: dict[str, Path] = {}
"""Corpus -> where `shard_dirs` wrote it."""


def space_of(protocol: dict[str, Any], **tune: Any) -> SearchSpace:
    experiment = {"name": "x", "corpora": dict.fromkeys(HAS, "d"), "backbone": "b", "emotions": list(EMOTIONS)}
    return SearchSpace.model_validate({"experiment": experiment | {"protocol": protocol}, "tune": tune})


@pytest.fixture(scope="module", autouse=True)
def shard_dirs(tmp_path_factory) -> list[Path]:
    """Six speakers of each corpus, who say each of its emotions three times."""
    for corpus, emotions in HAS.items():
        rows = [
            dict.fromkeys(shards.SCHEMA.names)
            | {"utterance_id": f"{corpus}/{s}-{emotion}-{n}", "corpus": corpus, "speaker": f"{corpus}/{s}"}
            | {
                "emotion": emotion,
                "path": "x.wav",
                "duration": 1.0,
                "num_samples": 1,
                "audio_sha256": "",
                "audio": b"ab",
            }
            for s in range(6)
            for emotion in emotions
            for n in range(3)
        ]
        directory = tmp_path_factory.mktemp(corpus)
        shards.write_shard(pa.Table.from_pylist(rows, shards.SCHEMA), directory / "one.parquet")
        shards.write_manifest(directory, corpus, ["one.parquet"], [], Audio())
        SHARDS[corpus] = directory
    return list(SHARDS.values())


def task_of(space: SearchSpace) -> Task:
    return load_task(space.experiment, list(SHARDS.values()))


def guesses(space: SearchSpace, fold: int, split: str, right: float, seed: int = 0) -> Predictions:
    """Of all four emotions, as a head gives them; wrong ones are of any emotion."""
    protocol = space.experiment.protocol.model_copy(update={"fold": fold})
    task = task_of(space.model_copy(update={"experiment": space.experiment.model_copy(update={"protocol": protocol})}))
    rng = np.random.default_rng(seed + 10 * fold)
    labels = task.labels(split)
    probabilities = {}
    for utterance_id, label in labels.items():
        said = label if rng.random() < right else int(rng.integers(4))
        probabilities[utterance_id] = (np.eye(4)[said] + 0.1 * rng.random(4)) / 2
        probabilities[utterance_id] /= probabilities[utterance_id].sum()
    return _predictions(task, split, probabilities)


def record_of(directory: Path, space: SearchSpace, folds: list[int]) -> tuple[Any, list[TrialRecord]]:
    (directory / "audit.json").write_text('{"leaky": false}')
    runs = {i: [Run(i, fold, 0, f"finals/{i}-fold{fold}/epoch_002") for fold in folds] for i in ("001", "002")}
    dev = {i: [guesses(space, run.fold, "dev", right) for run in runs[i]] for i, right in (("001", 0.9), ("002", 0.5))}
    return Record(directory, space, task_of(space), dev, runs), tried(runs)


def tried(trial_ids: Iterable[str]) -> list[TrialRecord]:
    best = {"epoch": 2, "best_epoch": 2, "trainable_parameters": 5}
    return [TrialRecord(i, {}, "finished", history=[best]) for i in trial_ids]


def answer_of(directory: Path, space: SearchSpace, folds: list[int], baselines: dict[str, float]) -> dict[str, Any]:
    record, finalists = record_of(directory, space, folds)
    chosen = record.choose(finalists)
    assert chosen == "001"
    parts = [guesses(space, fold, "test", 0.9) for fold in folds]
    others = {n: [guesses(space, fold, "test", right, seed=5) for fold in folds] for n, right in baselines.items()}
    calibrated = record.calibration(chosen)
    record.write_dev(chosen, calibrated)
    answer: dict[str, Any] = record.test(chosen, parts, others, calibrated)
    return json.loads(json.dumps(answer, allow_nan=False))


@pytest.mark.parametrize(
    ("folds", "shared"),
    [([0], 0.0), ([0, 1], 0.5), ([0, 1, 2], 1.0)],  # the dev of fold 0 is the test of fold 1
)
def test_what_was_tested_and_dev_elsewhere_is_counted(tmp_path, folds, shared):
    space = space_of({"folds": 3}, final_folds=folds)
    answer = answer_of(tmp_path, space, folds, {})
    assert answer["tested"] == 36 * len(folds)
    assert answer["tested_in_dev"] == shared * answer["tested"]


def test_gaps_to_several_baselines_are_corrected_and_both_p_are_there(tmp_path):
    answer = answer_of(tmp_path, space_of({"folds": 3}), [0], {PROBE: 0.6, "other": 0.5})
    for name in ("uar", "accuracy", "kappa"):
        gaps = [answer["against"][rival][name] for rival in (PROBE, "other")]
        low, high = sorted(gaps, key=lambda gap: gap["p"])
        assert low["p_holm"] == pytest.approx(min(1, 2 * low["p"]))
        assert high["p_holm"] == pytest.approx(max(low["p_holm"], high["p"]))
        assert {gap["comparisons"] for gap in gaps} == {2}
    assert answer["baselines"][PROBE]["ci95_unit"] == "speakers"


def half_known(space: SearchSpace, fold: int, known: tuple[int, ...], share: float) -> Predictions:
    """A model that is right on two of the four emotions, and of the rest on a share, with little confidence."""
    said = guesses(space, fold, "dev", 0.0)
    rng = np.random.default_rng(fold + sum(known))
    rows = []
    for label in said.labels:
        sure = label in known
        pick = int(label) if sure or rng.random() < share else int(rng.integers(4))
        rows.append((1 + (4 if sure else 0.5) * np.eye(4)[pick]) / (8 if sure else 4.5))
    return replace(said, probabilities=np.array(rows))


@pytest.mark.parametrize(("known", "is_used"), [(((0, 1), (2, 3)), True), (((0, 1, 2, 3), (0, 1)), False)])
def test_an_ensemble_is_used_where_it_is_better_on_speakers_that_did_not_choose_it(tmp_path, known, is_used):
    """Two models that know different emotions complement each other; one that knows all needs nobody."""
    space = space_of({"folds": 3}, final_folds=[0, 1], ensemble=4)
    (tmp_path / "audit.json").write_text('{"leaky": false}')
    runs = {i: [Run(i, fold, 0, f"finals/{i}-fold{fold}/epoch_002") for fold in (0, 1)] for i in ("001", "002")}
    dev = {
        i: [half_known(space, run.fold, own, 0.1 if i == "002" else 0.3) for run in runs[i]]
        for (i, own) in zip(runs, known, strict=True)
    }
    record = Record(tmp_path, space, task_of(space), dev, runs)
    best = record.choose(tried(runs))
    single = ensemble.trial(runs[best], dev[best])
    by_run = {run: part for i in runs for run, part in zip(runs[i], dev[i], strict=True)}
    grown, chosen = record.with_ensemble(single, {}, by_run)
    written = json.loads((tmp_path / "evaluation/ensemble.json").read_text())
    assert written["used"] is is_used
    assert written["single"] == best
    assert written["dev"]["single"] == pytest.approx(
        np.mean([recall_score(p.labels, p.predicted, average="macro") for p in dev[best]])
    )
    if not is_used:
        assert (grown, chosen) == (record, single)
        return
    assert written["dev"]["held_out"] > written["dev"]["single"]
    assert chosen.name == "ensemble"
    assert {member.candidate.runs[0].trial_id for member in chosen.members} == {"001", "002"}
    assert chosen.needed[-1].fold == 1
    assert [run.fold for run in grown.runs["ensemble"]] == [0, 1]
    low, high = written["against"]["uar"]["ci95"]
    assert low < written["against"]["uar"]["difference"] < high


def test_emotions_of_one_corpus_are_out_of_every_figure(tmp_path):
    """Trained on one corpus, tested on another: two of four emotions are common. Chance is a half, not a quarter."""
    space = space_of({"scheme": "cross_corpus", "train_on": ["ravdess"], "held_out": "emodb", "folds": 3})
    task = task_of(space)
    assert counted_emotions(task.index, task.emotions, task.fold) == ("angry", "sad")
    answer = answer_of(tmp_path, space, [0], {PROBE: 0.5})
    assert answer["labels"] == ["angry", "sad"]
    assert np.array(answer["confusion"]).shape == (2, 2)
    assert np.sum(answer["confusion"]) == answer["n"] == 36
    assert list(answer["per_emotion"]) == ["angry", "sad"]
    assert answer["baselines"]["chance"]["uar"] == 0.5
    assert answer["baselines"]["majority"]["uar"] == 0.5
    # Macro F1 by hand, over two emotions.
    (a, b), (c, d) = answer["confusion"]
    assert answer["macro_f1"] == pytest.approx((2 * a / (2 * a + b + c) + 2 * d / (2 * d + b + c)) / 2)
    dev = json.loads((tmp_path / "evaluation/dev.json").read_text())
    assert dev["labels"] == ["angry", "sad"]


def test_elsewhere_an_emotion_that_is_absent_stays():
    space = space_of({"scheme": "leave_one_corpus_out", "held_out": "emodb", "folds": 3})
    task = task_of(space)
    assert counted_emotions(task.index, task.emotions, task.fold) == EMOTIONS
    assert guesses(space, 0, "test", 0.9).emotions == EMOTIONS


def test_probabilities_over_fewer_emotions_sum_to_one_and_keep_their_order():
    space = space_of({"folds": 3})
    whole = guesses(space, 0, "test", 0.5)
    rows = [n for n, label in enumerate(whole.labels) if label in (0, 3)]
    columns = ("utterance_ids", "corpora", "speakers")
    part = Predictions(
        whole.emotions,
        *(tuple(getattr(whole, name)[n] for n in rows) for name in columns),
        whole.labels[rows],
        whole.probabilities[rows],
    )
    over = part.over(("sad", "angry"))
    assert over.labels.tolist() == [(0 if label == 3 else 1) for label in part.labels]
    expected = part.probabilities[:, [3, 0]]
    np.testing.assert_allclose(over.probabilities, expected / expected.sum(axis=1, keepdims=True), rtol=1e-12)
