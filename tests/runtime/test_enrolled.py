"""From training to the curve on a small corpus: what an evaluation actor answers with recordings of speakers known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_verbs import write_space

from ser_ray import config
from ser_ray.__main__ import main
from ser_ray.evaluation.enrolment import answered_with
from ser_ray.evaluation.folder import trial_history
from ser_ray.evaluation.results import read_results
from ser_ray.models import checkpoint
from ser_ray.protocols.task import Task
from ser_ray.runtime.scorer import Scorer

POINTS = [0, 1, 4, "others"]


@pytest.fixture(scope="module")
def space(tiny_corpus, tiny_cache, tmp_path_factory) -> Path:
    return write_space(tmp_path_factory.mktemp("enrolled"), tiny_corpus, tiny_cache)


@pytest.fixture(scope="module")
def trained(space) -> Path:
    """A results folder of one trial, trained in this process."""
    return _train(space, "voices", "resources.workers=0")


def _train(space: Path, name: str, *overrides: str) -> Path:
    changes = ("head.speaker=center", "protocol.enrolment.recordings=[0,1,4,others]", "protocol.enrolment.draws=2")
    own = [f"experiment.name={name}", "experiment.adapter.method=frozen", *(f"experiment.{c}" for c in changes)]
    assert main(["train", str(space), *own, *overrides]) == 0
    return space.parent / "results" / name


@pytest.fixture(scope="module")
def actor(trained) -> Scorer:
    shards = [data["directory"] for data in json.loads((trained / "provenance.json").read_text())["data"]]
    return Scorer(shards, str(trained / "trials" / "folds"), 1, 0)


def _checkpoint(trained: Path) -> Path:
    return sorted((trained / "trials" / "single").glob("epoch_*"))[-1]


def test_no_recording_is_the_headline(trained, actor):
    """Two ways to the same probabilities: batch by batch, and arithmetic on pooled vectors."""
    plain = actor.score(str(_checkpoint(trained)), "test")
    points = actor.enrolled(str(_checkpoint(trained)), "test")
    assert [point.recordings for point in points] == POINTS
    assert [len(point.draws) for point in points] == [1, 2, 2, 1]
    assert points[0].draws[0].utterance_ids == plain.utterance_ids
    np.testing.assert_allclose(points[0].draws[0].probabilities, plain.probabilities, atol=1e-5)
    assert points[0].used == 0
    assert points[1].used == 1
    for point in points[1:]:
        assert np.abs(point.draws[0].probabilities - plain.probabilities).max() > 1e-3
    assert not np.array_equal(points[1].draws[0].probabilities, points[1].draws[1].probabilities)


@pytest.mark.parametrize("count", [1, 4, "others"])
def test_the_answers_are_those_of_a_plain_loop(trained, actor, count):
    """One utterance at a time, its speaker's mean written out."""
    model = checkpoint.load(_checkpoint(trained))
    task = Task.read(next((trained / "trials" / "folds").glob("*.parquet")))
    rows = task.rows("test").sort_by("utterance_id").to_pylist()
    vectors = {}
    for batch in actor._batches(task, "test", 0.1):  # one at a time
        assert len(batch) == 1
        with torch.inference_mode():
            vectors[batch.utterance_ids[0]] = model.pooled(batch.inputs, batch.lengths_B)[0].double()
    columns = ([row[name] for row in rows] for name in ("utterance_id", "speaker", "emotion"))
    enrolment = model.experiment.protocol.enrolment
    chosen = answered_with(*columns, enrolment, count, 0)
    found = next(p for p in actor.enrolled(str(_checkpoint(trained)), "test") if p.recordings == count).draws[0]
    average = model.head.speaker.mean_P.double()
    for n, (row, own) in enumerate(zip(rows, chosen, strict=True)):
        assert {rows[other]["speaker"] for other in own} <= {row["speaker"]}
        total = sum(vectors[rows[other]["utterance_id"]] for other in own)
        mean = (total + 2 * average) / (len(own) + 2)
        with torch.inference_mode():
            logits_K = model.head.classify((vectors[row["utterance_id"]] - mean).float()[None])[0]
        np.testing.assert_allclose(found.probabilities[n], logits_K.softmax(-1), atol=2e-5)


def test_the_fold_does_not_depend_on_it(trained, space):
    """Its file is that of the same split with other points."""
    from ser_ray.protocols.task import fold_path

    read = config.load(trained / "search.yaml").experiment
    other = read.model_copy(update={"protocol": read.protocol.model_copy(update={"enrolment": config.Enrolment()})})
    assert fold_path(read, [], Path()) == fold_path(other, [], Path())


def test_predict_with_a_table_is_the_evaluation_with_all_others(trained, actor, tiny_corpus, tmp_path, capsys):
    """The same recordings from their files, in another order and by other names of the speakers."""
    (point,) = (p for p in actor.enrolled(str(_checkpoint(trained)), "test") if p.recordings == "others")
    (expected,) = point.draws
    table = tmp_path / "calls.csv"
    lines = [
        f"{tiny_corpus / f'Actor_{speaker[-2:]}' / (utterance_id.partition('/')[2] + '.wav')},who-{speaker[-2:]}"
        for utterance_id, speaker in zip(expected.utterance_ids, expected.speakers, strict=True)
    ]
    table.write_text("\n".join(["path,speaker", *reversed(lines)]) + "\n")
    assert main(["predict", str(_checkpoint(trained)), str(table), "--enrol", "self", "--format", "jsonl"]) == 0
    printed = capsys.readouterr()
    assert "used all other unlabelled recordings of the speaker" in printed.err
    answers = {Path(answer["path"]).stem: answer for answer in map(json.loads, printed.out.splitlines())}
    assert len(answers) == len(expected)
    for utterance_id, probabilities_K in zip(expected.utterance_ids, expected.probabilities, strict=True):
        found = answers[utterance_id.partition("/")[2]]["probabilities"]
        assert list(found) == list(expected.emotions)
        np.testing.assert_allclose(list(found.values()), probabilities_K, atol=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_streams_takes_the_same_steps(trained, space, ray_cluster):
    """Between two epochs it reads all of train once more, for the voices."""
    streamed = _train(space, "streamed", "resources.data=streamed")
    mine, theirs = (trial_history(folder / "trials" / "single") for folder in (streamed, trained))
    assert [record["epoch"] for record in mine] == [1, 2]
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
        assert ours["dev_loss"] == pytest.approx(expected["dev_loss"], rel=1e-3)


@pytest.mark.ray
def test_an_evaluation_writes_the_curve_beside_the_headline(trained, ray_cluster, capsys):
    assert main(["evaluate", str(trained)]) == 0
    assert "scoring dev and test with unlabelled recordings of each speaker known: 0, 1, 4, others" in (
        capsys.readouterr().out
    )
    results = read_results(trained)
    for split, headline in (("dev", results.dev), ("test", results.test)):
        rows = results.enrolment[split]
        assert [row["recordings"] for row in rows] == POINTS
        assert rows[0]["uar"] == pytest.approx(headline["uar"])
        assert rows[0]["ci95"]["uar"] == pytest.approx(headline["ci95"]["uar"])
        assert "enrolment" not in headline["protocol"]
    audit = json.loads((trained / "audit.json").read_text())
    (found,) = (one for one in audit["findings"] if one["what"] == "speakers are known")
    assert "without labels (0, 1, 4, others)" in found["detail"]
    assert main(["report", str(trained), "--no-audio"]) == 0
    assert "used 4 unlabelled recordings of the speaker" in (trained / "report.html").read_text()
