"""The audit names what crosses splits, and only that."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from ser_ray.protocols.leakage import audit
from ser_ray.schema import Fold

CLEAN = [  # utterance, speaker, emotion, digest of the audio, split
    ("a", "1", "sad", "A", "train"),
    ("b", "1", "happy", "B", "train"),
    ("c", "2", "sad", "C", "dev"),
    ("d", "2", "happy", "D", "dev"),
    ("e", "3", "sad", "E", "test"),
    ("f", "3", "happy", "F", "test"),
]


def audited(rows: list[tuple[str, str, str, str, str]], leaky: bool = False) -> dict:
    index = pa.table(
        {
            "utterance_id": [row[0] for row in rows],
            "speaker": [row[1] for row in rows],
            "emotion": [row[2] for row in rows],
            "audio_sha256": [row[3] for row in rows],
            "duration": [30.0] * len(rows),
        }
    )
    return audit(index, Fold({row[0]: row[4] for row in rows}, leaky, "as told"), ("sad", "happy"))


def found(rows: list[tuple[str, str, str, str, str]], leaky: bool = False) -> list[tuple[str, str, str]]:
    return [(f["level"], f["what"], f["detail"]) for f in audited(rows, leaky)["findings"]]


def test_a_clean_fold_has_no_findings_and_is_described():
    result = audited(CLEAN)
    assert not result["leaky"]
    assert result["findings"] == []
    one = {"utterances": 2, "speakers": 1, "minutes": 1.0, "emotions": {"sad": 1, "happy": 1}}
    assert result["splits"] == {"train": one, "dev": one, "test": one}
    assert json.loads(json.dumps(result)) == result


def test_a_random_split_is_leaky_by_name():
    assert audited(CLEAN, leaky=True)["leaky"]
    assert found(CLEAN, leaky=True) == [("leak", "the protocol shares speakers by design", "as told")]


def test_a_shared_speaker_is_a_leak():
    rows = [*CLEAN, ("g", "1", "sad", "G", "test")]
    assert found(rows) == [("leak", "speakers shared by train and test", "1: 1")]
    assert audited(rows)["leaky"]


def test_identical_audio_across_splits_is_a_leak():
    rows = [*CLEAN, ("g", "3", "sad", "A", "test")]
    assert found(rows) == [("leak", "identical audio across splits", "1: a = g")]
    assert audited(rows)["leaky"]


def test_identical_audio_within_a_split_is_noted():
    rows = [*CLEAN, ("g", "1", "sad", "A", "train"), ("h", "1", "sad", "A", "train")]
    assert found(rows) == [("note", "identical audio within a split", "1: a = g = h")]
    assert not audited(rows)["leaky"]


def test_identical_audio_under_two_emotions_is_noted():
    rows = [*CLEAN, ("g", "1", "happy", "A", "train")]
    assert ("note", "identical audio under different emotions", "1: a = g") in found(rows)


@pytest.mark.parametrize(("split", "level"), [("train", "error"), ("dev", "note"), ("test", "note")])
def test_an_absent_emotion_is_an_error_only_in_train(split, level):
    rows = [row for row in CLEAN if row[4] != split or row[2] == "sad"]
    ((found_level, what, detail),) = found(rows)
    assert (found_level, what) == (level, f"emotion absent from {split}")
    assert detail.startswith("happy")


def test_the_gravest_comes_first_and_long_lists_are_cut():
    rows = [
        (f"{n}{split}", f"{n}", "sad", f"{n}{split}", split) for n in range(9) for split in ("train", "dev", "test")
    ]
    levels = [level for level, _, _ in found(rows)]
    assert levels == ["error", "leak", "leak", "leak", "note", "note"]
    assert ("leak", "speakers shared by train and dev", "9: 0, 1, 2, 3, 4 and 4 more") in found(rows)
