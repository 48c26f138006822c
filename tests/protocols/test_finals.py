"""Every fold that a search trains is listed, and audited, once."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ser_ray.config import SearchSpace
from ser_ray.protocols.finals import final_runs, more_dev, trained_folds, trained_protocols
from ser_ray.protocols.folds import labelled, make_fold
from ser_ray.protocols.leakage import audit_search
from ser_ray.protocols.task import Task
from ser_ray.schema import UserError


def space_of(protocol: dict[str, Any], tune: dict[str, Any], **changes: Any) -> SearchSpace:
    experiment = {"name": "x", "corpora": {"a": "a"}, "backbone": "b", "emotions": ["happy", "sad"]}
    return SearchSpace.model_validate({"experiment": experiment | {"protocol": protocol} | changes, "tune": tune})


def index_of(speakers: int = 8) -> pa.Table:
    rows = [
        {
            "utterance_id": f"a/{speaker}{emotion}",
            "corpus": "a",
            "speaker": f"a/{speaker}",
            "emotion": emotion,
            "gender": None,
            "duration": 1.0 + speaker,
            "audio_sha256": f"{speaker}{emotion}",
            "perceived": None,
        }
        for speaker in range(speakers)
        for emotion in ("happy", "sad")
    ]
    return labelled(pa.Table.from_pylist(rows), ("happy", "sad"), {})


def task_of(space: SearchSpace, index: pa.Table) -> Task:
    fold = make_fold(index, space.experiment.protocol)
    splits = pa.array([fold.splits[i] for i in index["utterance_id"].to_pylist()])
    whole = index.append_column("own_split", pa.nulls(len(index), pa.string())).append_column("split", splits)
    return Task(space.experiment.emotions, whole, fold.description, fold.leaky, fold.common_emotions)


@pytest.mark.parametrize(
    ("tune", "expected"),
    [
        ({}, [(1, 1)]),
        ({"final_seeds": 3}, [(1, 1)]),
        ({"final_folds": [0, 2]}, [(1, 1), (0, 1), (2, 1)]),
        ({"final_folds": "all"}, [(1, 1), (0, 1), (2, 1), (3, 1)]),
        ({"final_seeds": 2, "rotate_dev": True}, [(1, 1), (1, 2)]),
        ({"final_folds": [0], "final_seeds": 2, "rotate_dev": True}, [(1, 1), (0, 1), (0, 2)]),
    ],
)
def test_the_folds_that_are_trained_begin_with_the_searchs_own(tune, expected):
    space = space_of({"folds": 4, "fold": 1}, tune)
    assert [(p.fold, p.dev_after) for p in trained_protocols(space, index_of())] == expected


def test_dev_that_comes_round_is_one_fold():
    """Of three folds dev can be two: the third seed has that of the first."""
    space = space_of({"folds": 3}, {"final_seeds": 3, "rotate_dev": True})
    folds = trained_folds(space, index_of(6))
    assert list(folds) == ["fold 0, dev_after 1", "fold 0, dev_after 2"]
    dev = [{i for i, split in fold.splits.items() if split == "dev"} for fold in folds.values()]
    assert not dev[0] & dev[1]


def test_runs_are_folds_by_seeds_with_the_own_first():
    space = space_of({"folds": 3, "fold": 1}, {"final_folds": "all", "final_seeds": 2}, seed=5)
    assert final_runs(space, index_of()) == [(1, 5), (0, 5), (0, 6), (1, 6), (2, 5), (2, 6)]
    with pytest.raises(UserError, match=r"tune\.final_folds: 7, but the protocol has folds 0 to 2"):
        final_runs(space_of({"folds": 3}, {"final_folds": [7]}), index_of())


def test_an_emotion_that_only_a_final_fold_lacks_in_train_is_found_before_the_search():
    index = index_of(4).filter((pc.field("emotion") == "happy") | pc.field("speaker").isin(["a/1", "a/2"]))
    protocol = {"scheme": "given_folds", "given": [[f"a/{n}"] for n in range(4)], "fold": 0}
    # Sad are speakers 1 and 2 alone: fold 0 tests 0 and trains on 2; fold 1 tests 1, has 2 in dev and trains on none.
    alone, finals = (space_of(protocol, tune) for tune in ({}, {"final_folds": [1]}))
    assert "error" not in {f["level"] for f in audit_search(alone, task_of(alone, index))["findings"]}
    error = audit_search(finals, task_of(finals, index))["findings"][0]
    assert (error["level"], error["what"]) == ("error", "emotion absent from train")
    assert error["detail"] == "fold 1: sad cannot be learned"


@pytest.mark.parametrize(
    ("protocol", "tune", "remedy"),
    [
        ({"folds": 4}, {}, "tune.final_folds: all"),
        ({"folds": 4}, {"final_folds": "all"}, "tune.final_seeds: 3 and tune.rotate_dev: true"),
        ({"scheme": "leave_one_corpus_out", "held_out": "a"}, {}, "tune.final_seeds: 3 and tune.rotate_dev: true"),
        ({"scheme": "official"}, {}, "more speakers in the data"),
    ],
)
def test_the_remedy_for_few_speakers_in_dev_is_one_that_helps(protocol, tune, remedy):
    assert more_dev(space_of(protocol, tune), index_of()) == remedy


def test_folds_that_rotate_have_enough_speakers_together():
    index = index_of(8)
    findings = []
    for tune in ({}, {"final_folds": "all"}):
        space = space_of({"folds": 4}, tune)
        findings.append([f["what"] for f in audit_search(space, task_of(space, index))["findings"]])
    assert findings == [["few speakers in dev", "few speakers in test"], []]


def test_utterances_that_no_listener_judged_are_counted_where_their_label_is_asked_for():
    index = index_of()
    space = space_of({"folds": 4}, {"final_folds": "all"}, label="perceived")
    (note,) = audit_search(space, task_of(space, index))["findings"]
    assert note == {
        "level": "note",
        "what": "no listener ratings",
        "detail": "16 of a: the intended emotion is used",
    }
