"""The audit names what crosses splits and what is wrong with the data, and only that."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from ser_ray.protocols.leakage import audit
from ser_ray.schema import Fold
from ser_ray.speech.fingerprint import SameTake

Row = tuple[str, str, str, str, str]
"""Utterance, speaker, emotion, digest of the audio, split."""

CLEAN: list[Row] = [
    (f"{speaker}{emotion[0]}", speaker, emotion, f"{speaker}{emotion}", split)
    for speaker, split in [("1", "train"), ("2", "dev"), *((s, "test") for s in "34567")]
    for emotion in ("sad", "happy")
]


def audited(rows: list[Row], leaky=False, takes=(), corpus="c", seconds=30.0, common=False, heard=()) -> dict:
    index = pa.table(
        {
            "utterance_id": [row[0] for row in rows],
            "corpus": [corpus] * len(rows) if isinstance(corpus, str) else corpus,
            "speaker": [row[1] for row in rows],
            "emotion": [row[2] for row in rows],
            "audio_sha256": [row[3] for row in rows],
            "duration": [seconds] * len(rows) if isinstance(seconds, float) else seconds,
        }
    )
    fold = Fold({row[0]: row[4] for row in rows}, leaky, "as told", common)
    return audit(index, fold, ("sad", "happy"), takes, heard)


def found(rows: list[Row], **how) -> list[tuple[str, str, str]]:
    return [(f["level"], f["what"], f["detail"]) for f in audited(rows, **how)["findings"]]


def test_a_clean_fold_has_no_findings_and_is_described():
    result = audited(CLEAN)
    assert not result["leaky"]
    assert result["findings"] == []
    one = {"utterances": 2, "speakers": 1, "minutes": 1.0, "emotions": {"sad": 1, "happy": 1}}
    five = {"utterances": 10, "speakers": 5, "minutes": 5.0, "emotions": {"sad": 5, "happy": 5}}
    assert result["splits"] == {"train": one, "dev": one, "test": five}
    assert json.loads(json.dumps(result)) == result


def test_a_random_split_is_leaky_by_name():
    assert audited(CLEAN, leaky=True)["leaky"]
    assert found(CLEAN, leaky=True) == [("leak", "the protocol shares speakers by design", "as told")]


def test_what_a_backbone_has_heard_before_is_a_leak():
    assert found(CLEAN, heard=["mine: 1 sentence"]) == [
        ("leak", "a backbone was pre-trained on this", "mine: 1 sentence")
    ]


def test_a_shared_speaker_is_a_leak():
    rows = [*CLEAN, ("g", "1", "sad", "G", "test")]
    assert found(rows) == [("leak", "speakers shared by train and test", "1: 1")]
    assert audited(rows)["leaky"]


def test_identical_audio_across_splits_is_a_leak():
    rows = [*CLEAN, ("g", "3", "sad", "1sad", "test")]
    assert found(rows) == [
        ("leak", "identical audio across splits", "1: 1s = g"),
        ("note", "identical audio under different speakers", "1: 1s = g"),
    ]
    assert audited(rows)["leaky"]


def test_identical_audio_within_a_split_is_noted():
    rows = [
        *CLEAN,
        ("g", "1", "sad", "1sad", "train"),
        ("h", "1", "happy", "H", "train"),
        ("i", "1", "sad", "H", "train"),
    ]
    assert ("note", "identical audio within a split", "2: 1s = g, h = i") in found(rows)
    assert ("note", "identical audio under different emotions", "1: h = i") in found(rows)
    assert not audited(rows)["leaky"]


def test_a_version_of_a_take_across_splits_is_a_leak_and_within_one_a_note():
    across, within = SameTake("1h", "3h", 0.01), SameTake("4h", "4s", 0.0)
    assert found(CLEAN, takes=[across, within]) == [
        ("leak", "the same take across splits", "1: 1h ~ 3h"),
        ("note", "the same take within a split", "1: 4h ~ 4s"),
        ("note", "the same take under different emotions", "1: 4h ~ 4s"),
        ("note", "the same take under different speakers", "1: 1h ~ 3h"),
    ]
    assert audited(CLEAN, takes=[across])["leaky"]
    assert not audited(CLEAN, takes=[within])["leaky"]


def test_identical_audio_is_not_told_twice_and_utterances_outside_of_the_fold_not_at_all():
    rows = [*CLEAN, ("g", "1", "sad", "1sad", "train")]
    takes = [SameTake("1s", "g", 0.0), SameTake("1s", "elsewhere", 0.0)]
    assert found(rows, takes=takes) == found(rows) == [("note", "identical audio within a split", "1: 1s = g")]


@pytest.mark.parametrize(("split", "level"), [("train", "error"), ("dev", "note"), ("test", "note")])
def test_an_absent_emotion_is_an_error_only_in_train(split, level):
    first, *_ = found([row for row in CLEAN if row[4] != split or row[2] == "sad"])
    assert first[:2] == (level, f"emotion absent from {split}")
    assert first[2].startswith("happy")


def test_an_emotion_that_two_corpora_have_not_in_common_is_left_out_by_design():
    rows = [row for row in CLEAN if row[2] == "sad"]
    assert found(rows)[0][0] == "error"
    assert found(rows, common=True) == [
        ("note", "emotion not common to train and test", "happy: not learned, not counted")
    ]


@pytest.mark.parametrize(
    ("speakers", "what"),
    [(1, "one speaker in test"), (2, "few speakers in test"), (4, "few speakers in test"), (5, None)],
)
def test_a_test_split_of_few_speakers_is_noted(speakers, what):
    rows = [row for row in CLEAN if row[4] != "test" or int(row[1]) - 2 <= speakers]
    assert [f[:2] for f in found(rows)] == ([("note", what)] if what else [])


def test_a_corpus_of_two_voices_is_noted_by_name():
    corpora = ["pair" if row[1] in "67" else "many" for row in CLEAN]
    ((level, what, detail),) = found(CLEAN, corpus=corpora)
    assert (level, what) == ("note", "too few speakers in pair")
    assert detail.startswith("2: ")


@pytest.mark.parametrize(("sad", "noted"), [(69, False), (71, True), (29, True), (31, False)])
def test_emotions_that_are_distributed_otherwise_are_noted(sad, noted):
    """Train is half sad; the total variation is the difference of the shares of sad."""
    rows = [*CLEAN, *((f"d{n}", "8", "sad" if n < sad - 1 else "happy", f"d{n}", "dev") for n in range(98))]
    more = "sad" if sad > 50 else "happy"
    expected = f"most of all {more}: 50% of train, {max(sad, 100 - sad)}% of dev"
    what = "emotions are distributed otherwise in dev than in train"
    assert found(rows, seconds=[n / 10 for n in range(len(rows))]) == ([("note", what, expected)] if noted else [])


@pytest.mark.parametrize(("equal", "noted"), [(24, False), (25, True)])
def test_a_corpus_of_one_length_is_noted(equal, noted):
    rows = [*CLEAN, *((f"t{n}", "1", ("sad", "happy")[n % 2], f"t{n}", "train") for n in range(86))]
    seconds = [2.0 if n < equal else 3.0 + n / 1000 for n in range(100)]
    detail = f"{equal} of 100 last exactly 2 s: speech is lost, or silence added"
    assert found(rows, seconds=seconds) == ([("note", "c looks cut or padded to one length", detail)] if noted else [])


def test_the_gravest_comes_first_and_long_lists_are_cut():
    rows = [
        (f"{n}{split}", f"{n}", "sad", f"{n}{split}", split) for n in range(9) for split in ("train", "dev", "test")
    ]
    findings = found(rows, seconds=[float(n) for n in range(27)])
    assert [level for level, _, _ in findings] == ["error", "leak", "leak", "leak", "note", "note"]
    assert ("leak", "speakers shared by train and dev", "9: 0, 1, 2, 3, 4 and 4 more") in findings
