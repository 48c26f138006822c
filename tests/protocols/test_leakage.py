"""The audit names what crosses splits and what is wrong with the data, and only that."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pytest

from ser_ray.protocols.findings import COLUMNS, csv_text
from ser_ray.protocols.leakage import audit
from ser_ray.schema import Fold
from ser_ray.speech.matching import SameRecording

Row = tuple[str, str, str, str, str]
"""Utterance, speaker, emotion, digest of the audio, split."""

CLEAN: list[Row] = [
    (f"{speaker}{emotion[0]}", speaker, emotion, f"{speaker}{emotion}", split)
    for speaker, split in [("1", "train"), *((s, "dev") for s in "289AB"), *((s, "test") for s in "34567")]
    for emotion in ("sad", "happy")
]


def audited(rows: list[Row], leaky=False, takes=(), corpus="c", seconds=None, common=False, heard=()) -> dict:
    fold = Fold({row[0]: row[4] for row in rows}, leaky, "as told", common)
    return audit(index_of(rows, corpus, seconds), {"fold 0": fold}, ("sad", "happy"), takes, heard)


def index_of(rows: list[Row], corpus="c", seconds=None) -> pa.Table:
    """Half a minute an utterance on average, no two pairs of one length."""
    return pa.table(
        {
            "utterance_id": [row[0] for row in rows],
            "corpus": [corpus] * len(rows) if isinstance(corpus, str) else corpus,
            "speaker": [row[1] for row in rows],
            "emotion": [row[2] for row in rows],
            "audio_sha256": [row[3] for row in rows],
            "duration": seconds or [30.0 + (-1) ** n * (n // 2) for n in range(len(rows))],
        }
    )


def found(rows: list[Row], **how) -> list[tuple[str, str, str]]:
    return [(f["level"], f["what"], f["detail"]) for f in audited(rows, **how)["findings"]]


def test_a_clean_fold_has_no_findings_and_is_described():
    result = audited(CLEAN)
    assert not result["leaky"]
    assert result["findings"] == []
    one = {"utterances": 2, "speakers": 1, "minutes": 1.0, "emotions": {"sad": 1, "happy": 1}}
    five = {"utterances": 10, "speakers": 5, "minutes": 5.0, "emotions": {"sad": 5, "happy": 5}}
    assert result["splits"] == {"train": one, "dev": five, "test": five}
    assert "folds" not in result
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
    across, within = SameRecording("1h", "3h", 0.01), SameRecording("4h", "4s", 0.0)
    assert found(CLEAN, takes=[across, within]) == [
        ("leak", "versions of one recording across splits", "1: 1h ~ 3h"),
        ("note", "versions of one recording within a split", "1: 4h ~ 4s"),
        ("note", "versions of one recording under different emotions", "1: 4h ~ 4s"),
        ("note", "versions of one recording under different speakers", "1: 1h ~ 3h"),
    ]
    assert audited(CLEAN, takes=[across])["leaky"]
    assert not audited(CLEAN, takes=[within])["leaky"]


def test_identical_audio_is_not_told_twice_and_utterances_outside_of_the_fold_not_at_all():
    rows = [*CLEAN, ("g", "1", "sad", "1sad", "train")]
    takes = [SameRecording("1s", "g", 0.0), SameRecording("1s", "elsewhere", 0.0)]
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
        ("note", "emotion not common to train and test", "happy: neither trained nor scored")
    ]


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize(
    ("speakers", "what", "unit"),
    [
        (1, "one speaker", "utterances"),
        (2, "few speakers", "over speakers are wide"),
        (4, "few speakers", "over speakers are wide"),
        (5, None, ""),
    ],
)
def test_a_split_of_few_speakers_is_noted_and_of_dev_the_remedy(split, speakers, what, unit):
    few = ("289AB" if split == "dev" else "34567")[:speakers]
    findings = found([row for row in CLEAN if row[4] != split or row[1] in few])
    if what is None:
        assert findings == []
        return
    ((level, told, detail),) = findings
    assert (level, told) == ("note", f"{what} in {split}")
    assert unit in detail
    assert detail.startswith(f"{speakers} speaker")
    assert ("tune.final_folds: all" in detail) is (split == "dev")


def rotated(leak_in: int | None = None) -> dict[str, Fold]:
    """Three folds of two speakers each, dev the next one; in one of them a dev speaker's utterance is trained on."""
    folds = {}
    for number in range(3):
        order = ("test", "dev", "train")
        splits = {row[0]: order[("123456".index(row[1]) // 2 - number) % 3] for row in SIX}
        if number == leak_in:
            splits[next(i for i, split in splits.items() if split == "dev")] = "train"
        folds[f"fold {number}"] = Fold(splits, False, f"split {number}")
    return folds


SIX: list[Row] = [(f"{s}{e[0]}", s, e, f"{s}{e}", "") for s in "123456" for e in ("sad", "happy")]


def test_a_leak_in_any_fold_that_is_trained_stamps_all_and_says_where():
    index = index_of(SIX)
    assert not audit(index, rotated(), ("sad", "happy"))["leaky"]
    result = audit(index, rotated(leak_in=2), ("sad", "happy"))
    assert result["leaky"]
    assert result["folds"] == {f"fold {n}": f"split {n}" for n in range(3)}
    leak, *rest = result["findings"]
    assert leak == {
        "level": "leak",
        "what": "speakers shared by train and dev",
        "detail": "fold 2: 1: 1",
        "groups": [{"speakers": ["1"], "folds": ["fold 2"]}],
        "folds": {"fold 2": "1: 1"},
    }
    # Of the first fold alone nothing would be known of it; six speakers are in dev and test of all folds together.
    assert not audit(index, {"fold 0": rotated(leak_in=2)["fold 0"]}, ("sad", "happy"))["leaky"]
    assert not [finding for finding in rest if "few speakers" in finding["what"]]
    assert json.loads(json.dumps(result)) == result


def test_what_every_fold_has_is_told_once():
    rows = [row for row in SIX if row[2] == "sad"]
    first, *rest = audit(index_of(rows), rotated_of(rows), ("sad", "happy"))["findings"]
    assert first["what"] == "emotion absent from train"
    assert first["detail"] == "happy cannot be learned"
    assert list(first["folds"]) == ["fold 0", "fold 1", "fold 2"]
    assert len({(finding["level"], finding["what"]) for finding in rest}) == len(rest)


def rotated_of(rows: list[Row]) -> dict[str, Fold]:
    kept = {row[0] for row in rows}
    return {
        name: Fold({i: s for i, s in fold.splits.items() if i in kept}, False, fold.description)
        for name, fold in rotated().items()
    }


def test_details_that_differ_are_told_by_fold_and_only_the_first_few():
    """Speaker n is in train and test of fold n; what is more than a line holds is in the record alone."""
    folds = {}
    for number in range(6):
        splits = {row[0]: ("dev" if row[1] in "56" else "train") for row in SIX}
        splits[SIX[2 * (number % 4)][0]] = "test"
        folds[f"fold {number}"] = Fold(splits, False, "")
    findings = audit(index_of(SIX), folds, ("sad", "happy"))["findings"]
    shared = next(finding for finding in findings if finding["what"] == "speakers shared by train and test")
    assert shared["folds"] == {f"fold {n}": f"1: {n % 4 + 1}" for n in range(6)}
    lines = "fold 0 / fold 4: 1: 1; fold 1 / fold 5: 1: 2; fold 2: 1: 3"
    assert shared["detail"] == f"{lines}; and 1 more in audit.json"


def test_a_corpus_of_two_voices_is_noted_by_name():
    corpora = ["pair" if row[1] in "67" else "many" for row in CLEAN]
    ((level, what, detail),) = found(CLEAN, corpus=corpora)
    assert (level, what) == ("note", "too few speakers in pair")
    assert detail.startswith("2: ")


@pytest.mark.parametrize(("sad", "noted"), [(69, False), (71, True), (29, True), (31, False)])
def test_emotions_that_are_distributed_otherwise_are_noted(sad, noted):
    """Train is half sad; the total variation is the difference of the shares of sad."""
    rows = [*CLEAN, *((f"d{n}", "8", "sad" if n < sad - 5 else "happy", f"d{n}", "dev") for n in range(90))]
    more = "sad" if sad > 50 else "happy"
    expected = f"most of all, {more}: 50% of train, {max(sad, 100 - sad)}% of dev"
    what = "emotions are distributed differently in dev than in train"
    assert found(rows, seconds=[n / 10 for n in range(len(rows))]) == ([("note", what, expected)] if noted else [])


@pytest.mark.parametrize(("equal", "noted"), [(24, False), (25, True)])
def test_a_corpus_of_one_length_is_noted(equal, noted):
    rows = [*CLEAN, *((f"t{n}", "1", ("sad", "happy")[n % 2], f"t{n}", "train") for n in range(78))]
    seconds = [2.0 if n < equal else 3.0 + n / 1000 for n in range(100)]
    detail = f"{equal} of 100 last exactly 2 s: speech was cut off, or silence added"
    assert found(rows, seconds=seconds) == ([("note", "c looks cut or padded to one length", detail)] if noted else [])


def test_the_gravest_comes_first_and_long_lists_are_cut():
    rows = [
        (f"{n}{split}", f"{n}", "sad", f"{n}{split}", split) for n in range(9) for split in ("train", "dev", "test")
    ]
    findings = found(rows, seconds=[float(n) for n in range(27)])
    assert [level for level, _, _ in findings] == ["error", "leak", "leak", "leak", "note", "note"]
    assert ("leak", "speakers shared by train and dev", "9: 0, 1, 2, 3, 4 and 4 more") in findings


def test_a_corpus_that_only_dev_and_test_have_is_noted():
    """Two speakers, one for dev and one for test: nobody learns from them. One that is held out is in test alone."""
    tess = [("t", "T", "sad", "t", "dev"), ("u", "U", "sad", "u", "test")]
    corpora = ["c"] * len(CLEAN) + ["tess"] * len(tess)
    whats = [what for _, what, _ in found([*CLEAN, *tess], corpus=corpora)]
    assert "corpus absent from train" in whats
    held_out = [what for _, what, _ in found([*CLEAN, tess[1]], corpus=corpora[:-1])]
    assert "corpus absent from train" not in held_out


def test_a_speaker_who_is_most_of_test_is_noted():
    more = [(f"more{n}", "3", "sad" if n % 2 else "happy", f"more{n}", "test") for n in range(12)]
    assert ("note", "one speaker is most of test") not in [finding[:2] for finding in found([*CLEAN, *more[:4]])]
    (detail,) = [detail for _, what, detail in found([*CLEAN, *more]) if what == "one speaker is most of test"]
    assert detail.startswith("3: 14 of 22 utterances")


def shared(rows: list[Row], pairs: list[tuple[str, str]], **how) -> list[tuple[str, str, str]]:
    takes = [SameRecording(one, other, 0.0) for one, other in pairs]
    return [one for one in found(rows, takes=takes, **how) if "one voice" in one[1]]


MORE: list[Row] = [
    (f"{speaker}{n}", speaker, ("sad", "happy")[n % 2], f"{speaker}{n}", split)
    for speaker, split in (("1", "train"), ("3", "test"), ("4", "test"))
    for n in range(6)
]


def test_two_speakers_that_share_many_recordings_are_one_voice():
    rows = [*CLEAN, *MORE]
    assert shared(rows, [(f"1{n}", f"3{n}") for n in range(2)]) == []
    ((level, what, detail),) = shared(rows, [(f"1{n}", f"3{n}") for n in range(3)])
    assert (level, what) == ("leak", "two speakers are one voice across splits")
    assert detail == "1: 1 = 3 (3 recordings shared); give both one name in the table, or exclude one"
    ((level, what, _),) = shared(rows, [(f"3{n}", f"4{n}") for n in range(3)])
    assert (level, what) == ("note", "two speakers are one voice within a split")


def test_excluded_duplicates_still_say_that_two_speakers_are_one_voice():
    """Their copies are gone from what is trained; the voice is not."""
    takes = [SameRecording(f"1{n}", f"3{n}", 0.0) for n in range(3)]
    gone = {f"3{n}" for n in range(3)}
    rows = [row for row in [*CLEAN, *MORE] if row[0] not in gone]
    out = index_of([row for row in MORE if row[0] in gone])
    for column in ("by", "reason"):
        out = out.append_column(column, pa.array(["duplicates"] * 3))
    fold = Fold({row[0]: row[4] for row in rows}, False, "", False)
    result = audit(index_of(rows), {"fold 0": fold}, ("sad", "happy"), takes, excluded=out)
    assert [one["what"] for one in result["findings"] if one["level"] == "leak"] == [
        "two speakers are one voice across splits"
    ]
    assert [one["utterance_id"] for one in result["excluded"]] == sorted(gone)
    assert result["to_exclude"] == []


def test_speakers_of_one_emotion_each_are_confounded_with_it():
    one_each = [
        (f"x{s}{n}", f"x{s}", ("sad", "happy")[s % 2], f"x{s}{n}", "train") for s in range(30) for n in range(2)
    ]
    told = [one for one in found([*CLEAN, *one_each]) if "confounded" in one[1]]
    assert told == [
        (
            "note",
            "emotion and speaker are confounded in c",
            "30 of 41 speakers have one emotion only: a model can learn voices in place of emotions",
        )
    ]
    assert [one for one in found([*CLEAN, *one_each[:20]]) if "confounded" in one[1]] == []


def test_all_of_a_finding_are_in_the_record_and_in_the_table():
    """Of nine pairs the line names five; audit.json and audit.csv have all, and say which to leave out."""
    rows = [(f"{s}{n}", s, "sad" if n else "happy", f"{n}", split) for n in range(9) for s, split in TWO]
    result = audited(rows)
    (across,) = [one for one in result["findings"] if one["what"] == "identical audio across splits"]
    assert across["detail"].endswith("and 4 more")
    assert [[u["utterance_id"] for u in group["utterances"]] for group in across["groups"]] == [
        [f"a{n}", f"b{n}"] for n in range(9)
    ]
    table = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert list(table[0]) == list(COLUMNS)
    mine = [row for row in table if row["finding"] == across["what"]]
    assert [row["utterance_id"] for row in mine] == [f"{s}{n}" for n in range(9) for s in "ab"]
    assert [row["exclude"] for row in mine] == ["", "yes"] * 9
    assert {row["reason"] for row in mine if row["exclude"]} == {f"the recording is that of a{n}" for n in range(9)}
    assert {row["finding"] for row in table} == {one["what"] for one in result["findings"]}


TWO = (("a", "train"), ("b", "test"))
