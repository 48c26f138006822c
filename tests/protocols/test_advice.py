"""What to set where a fold lacks an emotion: the advice is followed here, and then nothing is absent."""

from __future__ import annotations

import re
from collections import defaultdict

import pyarrow as pa

from ser_ray.config import SearchSpace
from ser_ray.protocols.advice import other_folds
from ser_ray.protocols.finals import trained_folds
from ser_ray.protocols.folds import labelled

EMOTIONS = ("angry", "happy", "neutral", "sad")


def one_emotion_each(speakers: dict[str, int], many: int = 4) -> pa.Table:
    """A corpus as URDU is: most speakers have one emotion only. ``speakers``: of each emotion."""
    names = [f"{emotion}{n}" for emotion, count in speakers.items() for n in range(count)]
    rows = [
        {
            "utterance_id": f"u/{name}-{take}",
            "corpus": "u",
            "speaker": f"u/{name}",
            "emotion": name.rstrip("0123456789"),
            "gender": None,
        }
        for number, name in enumerate(names)
        for take in range(many + number % 3)
    ]
    return labelled(pa.Table.from_pylist(rows), EMOTIONS, {})


def space_of(tune: dict | None = None, **protocol: object) -> SearchSpace:
    experiment = {"name": "x", "corpora": {"u": "u"}, "backbone": "b", "emotions": EMOTIONS, "protocol": protocol}
    return SearchSpace.model_validate({"experiment": experiment | {"emotions": list(EMOTIONS)}, "tune": tune or {}})


def advised(space: SearchSpace, index: pa.Table) -> list[str]:
    return list(other_folds(space, index, trained_folds(space, index)))


def absent(space: SearchSpace, index: pa.Table) -> set[tuple[str, str]]:
    emotion_of = dict(zip(index["utterance_id"].to_pylist(), index["emotion"].to_pylist(), strict=True))
    lacking = set()
    for fold in trained_folds(space, index).values():
        present = defaultdict(set)
        for i, split in fold.splits.items():
            present[split].add(emotion_of[i])
        lacking |= {(split, emotion) for split in present for emotion in set(EMOTIONS) - present[split]}
    return lacking


def test_every_value_that_is_named_gives_a_fold_with_all_emotions():
    index = one_emotion_each({"angry": 4, "happy": 8, "neutral": 8, "sad": 8})
    space = space_of(folds=8)
    assert "angry" in {emotion for _, emotion in absent(space, index)}
    (line,) = advised(space, index)
    assert line.startswith("angry: in train, dev and test with experiment.protocol.")
    named = re.findall(r"experiment\.protocol\.(\w+)=([\d or]+)", line)
    assert {key for key, _ in named} == {"fold", "folds", "seed"}
    for key, values in named:
        for value in values.split(" or "):
            assert absent(space_of(**({"folds": 8} | {key: int(value)})), index) == set(), (key, value)


def test_where_all_folds_are_trained_no_fold_is_advised():
    index = one_emotion_each({"angry": 5, "happy": 8, "neutral": 8, "sad": 8})
    lines = advised(space_of({"final_folds": "all"}, folds=8), index)
    assert all("protocol.fold=" not in line for line in lines)
    assert lines


def test_an_emotion_of_two_speakers_is_in_no_fold():
    index = one_emotion_each({"angry": 2, "happy": 8, "neutral": 8, "sad": 8})
    (line,) = advised(space_of(folds=5), index)
    assert line == "angry: fewer than 3 speakers have it, so no fold has it in train, dev and test"


def test_a_complete_fold_needs_no_advice():
    assert advised(space_of(folds=3), one_emotion_each(dict.fromkeys(EMOTIONS, 9))) == []
