"""Folds: no speaker on two sides, every utterance tested once, the same whatever the order of the rows."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.config import Protocol
from ser_ray.protocols.folds import EMOBOX_RAVDESS, labelled, make_fold, unheard
from ser_ray.schema import SPLITS, TIE, Fold, UserError

EMOTIONS = ("angry", "happy", "neutral", "sad")


def index(utterances: list[tuple[str, str, str, str | None]]) -> pa.Table:
    """From (corpus, speaker, emotion, gender)."""
    return pa.table(
        {
            "utterance_id": pa.array([f"{c}/{n:04d}" for n, (c, *_) in enumerate(utterances)], pa.string()),
            "corpus": pa.array([u[0] for u in utterances], pa.string()),
            "speaker": pa.array([f"{u[0]}/{u[1]}" for u in utterances], pa.string()),
            "emotion": pa.array([u[2] for u in utterances], pa.string()),
            "gender": pa.array([u[3] for u in utterances], pa.string()),
        }
    )


def corpus(name: str, speakers: int, per_emotion: int = 4) -> list[tuple[str, str, str, str | None]]:
    """As RAVDESS: actors from 01, odd ones male; neutral half as often as the others."""
    return [
        (name, f"{speaker:02d}", emotion, "male" if speaker % 2 else "female")
        for speaker in range(1, speakers + 1)
        for emotion in EMOTIONS
        for _ in range(per_emotion // 2 if emotion == "neutral" else per_emotion)
    ]


RAVDESS = index(corpus("ravdess", 24))


def speakers_by_split(table: pa.Table, fold: Fold) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for key, speaker in zip(table["utterance_id"].to_pylist(), table["speaker"].to_pylist(), strict=True):
        found[fold.splits[key]].add(speaker)
    return found


def check_tested_once(table: pa.Table, protocols: list[Protocol]) -> None:
    """No speaker is on two sides of any fold, and every utterance is tested in exactly one."""
    tested: Counter[str] = Counter()
    for protocol in protocols:
        fold = make_fold(table, protocol)
        one, two, three = speakers_by_split(table, fold).values()
        assert one
        assert two
        assert three
        assert not (one & two) | (one & three) | (two & three)
        assert not fold.leaky
        tested.update(key for key, split in fold.splits.items() if split == "test")
    assert tested == Counter(table["utterance_id"].to_pylist())


def utterances_of_speakers() -> st.SearchStrategy[pa.Table]:
    """6 to 9 speakers of two corpora with some utterances of some emotions, some without a gender."""
    speaker = st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["male", "female", None]),
        st.lists(st.sampled_from(EMOTIONS), min_size=1, max_size=6),
    )
    return st.lists(speaker, min_size=6, max_size=9).map(
        lambda found: index([(c, str(n), e, gender) for n, (c, gender, said) in enumerate(found) for e in said])
    )


ROTATE = ["speaker_kfold", "random"]


@settings(deadline=None)
@given(table=utterances_of_speakers(), folds=st.integers(3, 6), seed=st.integers(0, 3))
def test_speaker_kfold_shares_no_speaker_and_tests_and_validates_every_utterance_once(table, folds, seed):
    protocols = [Protocol(folds=folds, fold=number, seed=seed) for number in range(folds)]
    check_tested_once(table, protocols)
    validated = Counter(k for p in protocols for k, split in make_fold(table, p).splits.items() if split == "dev")
    assert validated == Counter(table["utterance_id"].to_pylist())


@settings(deadline=None, max_examples=50)
@given(table=utterances_of_speakers(), folds=st.integers(3, 6), fold=st.integers(0, 2), scheme=st.sampled_from(ROTATE))
def test_dev_goes_round_all_but_the_tested(table, folds, fold, scheme):
    rounds = [make_fold(table, Protocol(scheme=scheme, folds=folds, fold=fold, dev_after=n)) for n in range(1, folds)]
    again = make_fold(table, Protocol(scheme=scheme, folds=folds, fold=fold, dev_after=folds))
    (tested,) = {frozenset(k for k, split in one.splits.items() if split == "test") for one in rounds}
    validated = Counter(k for one in rounds for k, split in one.splits.items() if split == "dev")
    assert validated == Counter(k for k in table["utterance_id"].to_pylist() if k not in tested)
    assert again.splits == rounds[0].splits


@settings(deadline=None, max_examples=50)
@given(table=utterances_of_speakers(), folds=st.integers(2, 6), seed=st.integers(0, 3))
def test_leave_one_speaker_out_shares_no_speaker_and_tests_every_utterance_once(table, folds, seed):
    speakers = sorted(set(table["speaker"].to_pylist()))
    corpora = Counter(speaker.split("/")[0] for speaker in speakers)
    if min(corpora.values()) < 3:  # no group for dev beside the tested speaker: see the test of small corpora
        return
    protocols = [
        Protocol(scheme="leave_one_speaker_out", fold=number, folds=folds, seed=seed) for number in range(len(speakers))
    ]
    check_tested_once(table, protocols)
    for number, protocol in enumerate(protocols):
        assert speakers_by_split(table, make_fold(table, protocol))["test"] == {speakers[number]}


@settings(deadline=None, max_examples=50)
@given(table=utterances_of_speakers(), chance=st.randoms())
def test_given_folds_share_no_speaker_and_test_every_utterance_once(table, chance):
    speakers = sorted(set(table["speaker"].to_pylist()))
    chance.shuffle(speakers)
    given_folds = tuple(tuple(speakers[number::3]) for number in range(3))
    check_tested_once(table, [Protocol(scheme="given_folds", given=given_folds, fold=number) for number in range(3)])


@settings(deadline=None, max_examples=50)
@given(table=utterances_of_speakers(), folds=st.integers(3, 5), seed=st.integers(0, 3))
def test_random_folds_test_every_utterance_once_and_are_leaky(table, folds, seed):
    found = [
        make_fold(table, Protocol(scheme="random", folds=folds, fold=number, seed=seed)) for number in range(folds)
    ]
    tested = Counter(key for fold in found for key, split in fold.splits.items() if split == "test")
    assert tested == Counter(table["utterance_id"].to_pylist())
    assert all(fold.leaky for fold in found)


@settings(deadline=None, max_examples=50)
@given(table=utterances_of_speakers(), scheme=st.sampled_from(["leave_one_corpus_out", "cross_corpus"]))
def test_a_held_out_corpus_is_tested_and_nothing_else(table, scheme):
    protocol = Protocol(scheme=scheme, held_out="b", train_on=("a",) if scheme == "cross_corpus" else None)
    try:
        fold = make_fold(table, protocol)
    except UserError:  # a corpus is absent, has one speaker, or shares no emotion with the other
        return
    corpora = dict(zip(table["utterance_id"].to_pylist(), table["corpus"].to_pylist(), strict=True))
    assert {corpora[key] for key, split in fold.splits.items() if split == "test"} == {"b"}
    assert {corpora[key] for key, split in fold.splits.items() if split != "test"} == {"a"}
    found = speakers_by_split(table.filter(pa.array([key in fold.splits for key in corpora])), fold)
    assert not found["train"] & found["dev"]


ALL_SCHEMES = (
    Protocol(folds=3),
    Protocol(scheme="random", folds=3),
    Protocol(scheme="leave_one_speaker_out", fold=2),
    Protocol(scheme="leave_one_corpus_out", held_out="a"),
    Protocol(scheme="cross_corpus", held_out="a", train_on=("b",)),
    Protocol(scheme="official"),
)


@settings(deadline=None, max_examples=100)
@given(
    table=utterances_of_speakers(), order=st.randoms(), protocol=st.sampled_from(ALL_SCHEMES), seed=st.integers(0, 3)
)
def test_folds_do_not_depend_on_the_order_of_rows(table, order, protocol, seed):
    split_of = {
        speaker: ("train", "train", "test")[n % 3]
        for n, speaker in enumerate(sorted(set(table["speaker"].to_pylist())))
    }
    table = table.append_column("split", pa.array([split_of[speaker] for speaker in table["speaker"].to_pylist()]))
    rows = list(range(table.num_rows))
    order.shuffle(rows)
    protocol = protocol.model_copy(update={"seed": seed})

    def made(of: pa.Table) -> Fold | str:
        try:
            return make_fold(of, protocol)
        except UserError as error:
            return str(error)

    assert made(table.take(rows)) == made(table)


@pytest.mark.parametrize("folds", [3, 4, 5, 6, 12])
def test_folds_of_a_balanced_corpus_are_balanced(folds):
    tests = [
        speakers_by_split(RAVDESS, make_fold(RAVDESS, Protocol(folds=folds, fold=n)))["test"] for n in range(folds)
    ]
    women = [sum(int(speaker.removeprefix("ravdess/")) % 2 == 0 for speaker in test) for test in tests]
    sizes = [len(test) for test in tests]
    assert max(sizes) - min(sizes) <= 1
    assert max(women) - min(women) <= 1


def test_folds_of_an_unbalanced_corpus_are_as_even_as_speakers_allow():
    utterances = [("a", str(s), e, None) for s in range(20) for e in EMOTIONS for _ in range(1 + (7 * s) % 20)]
    table = index(utterances)
    sizes = [Counter(make_fold(table, Protocol(folds=5, fold=number)).splits.values())["test"] for number in range(5)]
    assert max(sizes) < 1.15 * min(sizes)


def test_the_seed_moves_speakers_and_stays_put():
    splits = [make_fold(RAVDESS, Protocol(seed=seed)).splits for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(
    ("speakers", "folds", "message"),
    [
        (1, 5, "only speakers are tess/01: .* add a corpus, or set protocol.scheme to random"),
        (2, 3, "only speakers are tess/01, tess/02: .* cannot be speaker-disjoint with fewer than 3"),
        (4, 5, "set protocol.folds to 4 or less"),
        (4, 2, "protocol.folds is 2"),
    ],
)
def test_too_few_speakers_are_refused(speakers, folds, message):
    with pytest.raises(UserError, match=message):
        make_fold(index(corpus("tess", speakers)), Protocol(folds=folds))


def test_emobox_folds_are_those_of_the_paper():
    for number, actors in enumerate(EMOBOX_RAVDESS):
        fold = make_fold(RAVDESS, Protocol(scheme="given_folds", given="emobox", fold=number))
        found = speakers_by_split(RAVDESS, fold)
        assert found["test"] == {f"ravdess/{actor}" for actor in actors}
        assert found["dev"] == {f"ravdess/{actor}" for actor in EMOBOX_RAVDESS[(number + 1) % 6]}
        assert len(found["train"]) == 16
    assert sorted(actor for actors in EMOBOX_RAVDESS for actor in actors) == [f"{n:02d}" for n in range(1, 25)]


def test_given_folds_of_ones_own():
    table = index(corpus("tess", 4))
    given_folds = (("tess/01",), ("tess/02", "tess/04"), ("tess/03",))
    fold = make_fold(table, Protocol(scheme="given_folds", given=given_folds, fold=2))
    assert speakers_by_split(table, fold) == {"train": {"tess/02", "tess/04"}, "dev": {"tess/01"}, "test": {"tess/03"}}


@pytest.mark.parametrize(
    ("given_folds", "fold", "message"),
    [
        ("emobox", 0, "ravdess/01.* not in the data"),
        ("folds", 0, "'folds' is not known"),
        ((("tess/01",), ("tess/02",), ("tess/03",)), 0, "tess/04 in no fold"),
        ((("tess/01",), ("tess/02",), ("tess/03", "tess/04", "tess/05")), 0, "tess/05 not in the data"),
        ((("tess/01",), ("tess/02", "tess/01"), ("tess/03", "tess/04")), 0, "tess/01 occurs more than once"),
        ((("tess/01", "tess/02"), ("tess/03", "tess/04")), 0, "need at least 3"),
        ((("tess/01",), ("tess/02",), ("tess/03", "tess/04")), 3, "has folds 0 to 2"),
        ((("tess/01", "tess/02", "tess/03", "tess/04"), (), ()), 0, "leaves nothing for train"),
    ],
)
def test_given_folds_that_do_not_fit_are_refused(given_folds, fold, message):
    with pytest.raises(UserError, match=message):
        make_fold(index(corpus("tess", 4)), Protocol(scheme="given_folds", given=given_folds, fold=fold))


def test_leave_one_corpus_out():
    table = index([*corpus("ravdess", 24), *corpus("emodb", 10), *corpus("tess", 2), *corpus("solo", 1)])
    fold = make_fold(table, Protocol(scheme="leave_one_corpus_out", held_out="emodb", folds=5))
    found = speakers_by_split(table, fold)
    assert {speaker.split("/")[0] for speaker in found["test"]} == {"emodb"}
    assert Counter(speaker.split("/")[0] for speaker in found["dev"]) == {"ravdess": 5, "tess": 1}
    assert Counter(speaker.split("/")[0] for speaker in found["train"]) == {"ravdess": 19, "tess": 1, "solo": 1}
    assert not fold.leaky


@pytest.mark.parametrize(
    ("corpora", "held_out", "message"),
    [
        (["ravdess", "emodb"], "tess", "'tess', the data have emodb, ravdess"),
        (["ravdess"], "ravdess", "at least one other"),
    ],
)
def test_leave_one_corpus_out_that_does_not_fit_is_refused(corpora, held_out, message):
    table = index([u for name in corpora for u in corpus(name, 4)])
    with pytest.raises(UserError, match=message):
        make_fold(table, Protocol(scheme="leave_one_corpus_out", held_out=held_out))


def test_leave_one_corpus_out_without_speakers_for_dev_is_refused():
    table = index([*corpus("ravdess", 4), *corpus("solo", 1)])
    with pytest.raises(UserError, match="leaves nothing for dev"):
        make_fold(table, Protocol(scheme="leave_one_corpus_out", held_out="ravdess"))


def test_the_random_split_is_stratified_tests_every_utterance_once_and_is_leaky():
    tested: Counter[str] = Counter()
    emotions = dict(zip(RAVDESS["utterance_id"].to_pylist(), RAVDESS["emotion"].to_pylist(), strict=True))
    for number in range(5):
        fold = make_fold(RAVDESS, Protocol(scheme="random", fold=number))
        test = [key for key, split in fold.splits.items() if split == "test"]
        tested.update(test)
        for emotion, n in Counter(emotions[key] for key in test).items():
            assert abs(n - Counter(emotions.values())[emotion] / 5) < 1
        assert fold.leaky
        assert "LEAKY" in fold.description
        assert speakers_by_split(RAVDESS, fold)["test"] & speakers_by_split(RAVDESS, fold)["train"]
    assert tested == Counter(emotions.keys())


@pytest.mark.parametrize("utterances", [1, 2])
def test_a_random_split_of_too_little_is_refused(utterances):
    with pytest.raises(UserError, match="leaves nothing for"):
        make_fold(RAVDESS.slice(0, utterances), Protocol(scheme="random"))


def test_a_description_is_one_line_of_facts():
    assert make_fold(RAVDESS, Protocol(folds=6, fold=2, seed=3)).description == (
        "speaker_kfold, fold 2 of 6, seed 3: speakers 16 train / 4 dev / 4 test"
    )


def test_given_folds_of_a_csv_file(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_text("speaker,fold\ntess/01,0\ntess/02,1\ntess/03,2\ntess/04,1\n")
    table = index(corpus("tess", 4))
    written = make_fold(table, Protocol(scheme="given_folds", given=str(path), fold=2))
    listed = Protocol(scheme="given_folds", given=(("tess/01",), ("tess/02", "tess/04"), ("tess/03",)), fold=2)
    assert written.splits == make_fold(table, listed).splits
    assert "folds.csv" in written.description


def test_leave_one_speaker_out_names_the_speaker_and_keeps_a_balanced_dev():
    fold = make_fold(RAVDESS, Protocol(scheme="leave_one_speaker_out", fold=2, folds=5))
    assert fold.description == (
        "leave_one_speaker_out, ravdess/03 held out, seed 0: speakers 18 train / 5 dev / 1 test"
    )
    women = [speaker for speaker in speakers_by_split(RAVDESS, fold)["dev"] if int(speaker[-2:]) % 2 == 0]
    assert len(women) in (2, 3)


@pytest.mark.parametrize(
    ("speakers", "fold", "message"),
    [(24, 24, "fold is 24, but the data have speakers 0 to 23"), (2, 0, "only speakers are tess/01, tess/02")],
)
def test_leave_one_speaker_out_that_does_not_fit_is_refused(speakers, fold, message):
    with pytest.raises(UserError, match=message):
        make_fold(index(corpus("tess", speakers)), Protocol(scheme="leave_one_speaker_out", fold=fold))


def cross(held_out: str, *train_on: str) -> Protocol:
    return Protocol(scheme="cross_corpus", held_out=held_out, train_on=train_on)


def test_cross_corpus_leaves_out_other_corpora_and_emotions_of_one_side():
    emodb = [("emodb", speaker, emotion, None) for speaker in "12" for emotion in ("angry", "sad", "boredom")]
    table = index([*corpus("ravdess", 10), *emodb, *corpus("tess", 2)])
    fold = make_fold(table, cross("emodb", "ravdess"))
    used = [
        row | {"split": fold.splits[row["utterance_id"]]}
        for row in table.to_pylist()
        if row["utterance_id"] in fold.splits
    ]
    assert {(row["corpus"], row["split"] == "test") for row in used} == {("ravdess", False), ("emodb", True)}
    assert {(row["emotion"], row["split"]) for row in used} == {
        (emotion, split) for emotion in ("angry", "sad") for split in SPLITS
    }
    assert len(used) == 10 * 8 + 2 * 2
    assert fold.description == "cross_corpus, ravdess to emodb, seed 0: speakers 8 train / 2 dev / 2 test"


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (cross("emodb", "ravdess"), "emodb not in the data, which have boring, ravdess"),
        (cross("ravdess", "emodb", "boring"), "emodb not in the data"),
        (cross("boring", "ravdess"), "ravdess and boring have no emotion in common"),
    ],
)
def test_cross_corpus_that_does_not_fit_is_refused(protocol, message):
    table = index([*corpus("ravdess", 4), ("boring", "1", "boredom", None)])
    with pytest.raises(UserError, match=message):
        make_fold(table, protocol)


def with_splits(table: pa.Table, split_of: dict[str, str | None]) -> pa.Table:
    splits = [split_of[speaker] for speaker in table["speaker"].to_pylist()]
    return table.append_column("split", pa.array(splits, pa.string()))


def test_the_official_split_is_the_columns():
    table = index(corpus("mine", 4))
    split_of = {"mine/01": "train", "mine/02": "dev", "mine/03": "test", "mine/04": "train"}
    fold = make_fold(with_splits(table, split_of), Protocol(scheme="official"))
    assert fold.splits == dict(
        zip(table["utterance_id"].to_pylist(), map(split_of.get, table["speaker"].to_pylist()), strict=True)
    )
    assert fold.description == "official split: speakers 2 train / 1 dev / 1 test"


def test_an_official_split_without_dev_takes_a_group_of_train_speakers_where_it_lacks():
    table = index([*corpus("mine", 12), *corpus("full", 3)])
    split_of = {f"mine/{n:02d}": "train" if n <= 10 else "test" for n in range(1, 13)}
    split_of |= {"full/01": "train", "full/02": "dev", "full/03": "test"}
    found = speakers_by_split(table, make_fold(with_splits(table, split_of), Protocol(scheme="official", folds=5)))
    assert found["test"] == {"mine/11", "mine/12", "full/03"}
    assert "full/02" in found["dev"]
    assert "full/01" in found["train"]
    assert sorted(int(speaker[-2:]) % 2 for speaker in found["dev"] - {"full/02"}) == [0, 1]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "dev", None), r"mine gives none for 14 \(such as mine/0028\); fill the column split"),
        (("train", "dev", "dev"), "official leaves nothing for test"),
        (("train", "test", "test"), "official leaves nothing for dev"),
    ],
)
def test_an_official_split_that_is_not_whole_is_refused(splits, message):
    table = index(corpus("mine", 3))
    with pytest.raises(UserError, match=message):
        make_fold(
            with_splits(table, dict(zip(("mine/01", "mine/02", "mine/03"), splits, strict=True))),
            Protocol(scheme="official"),
        )


def test_labelled_merges_drops_and_numbers():
    table = index([("a", "1", emotion, None) for emotion in ("calm", "sad", "boredom", "neutral", "calm")])
    found = labelled(table, ("neutral", "sad"), {"calm": "neutral"})
    assert found["utterance_id"].to_pylist() == ["a/0000", "a/0001", "a/0003", "a/0004"]
    assert found["emotion"].to_pylist() == ["neutral", "sad", "neutral", "neutral"]
    assert found["label"].to_pylist() == [0, 1, 0, 0]
    assert found["label"].type == pa.int64()


def test_labelled_with_nothing_left_is_refused():
    with pytest.raises(UserError, match=r"no utterance is fear or disgust; the corpora have angry, happy"):
        labelled(RAVDESS, ("fear", "disgust"), {})


def test_perceived_emotions_replace_intended_ones_where_they_are_known():
    table = index([("a", "1", emotion, None) for emotion in ("sad", "sad", "happy", "fear")])
    table = table.append_column("perceived", pa.array(["calm", None, "boredom", "happy"]))
    found = labelled(table, ("happy", "neutral", "sad"), {"calm": "neutral"}, "perceived")
    assert found["utterance_id"].to_pylist() == ["a/0000", "a/0001", "a/0003"]
    assert found["emotion"].to_pylist() == ["neutral", "sad", "happy"]
    assert found["label"].to_pylist() == [1, 2, 0]
    assert labelled(table, ("happy", "sad"), {})["emotion"].to_pylist() == ["sad", "sad", "happy"]


def test_where_listeners_were_undecided_nothing_is_put_in_the_place_of_their_label():
    table = index([("a", "1", emotion, None) for emotion in ("sad", "sad", "happy")] + [("b", "1", "sad", None)])
    table = table.append_column("perceived", pa.array([TIE, "happy", None, None]))
    found = labelled(table, ("happy", "sad"), {}, "perceived")
    assert found["utterance_id"].to_pylist() == ["a/0001", "a/0002", "b/0003"]
    assert found["emotion"].to_pylist() == ["happy", "happy", "sad"]
    assert unheard(found) == {"a": 1, "b": 1}
    assert labelled(table, ("happy", "sad"), {})["emotion"].to_pylist() == ["sad", "sad", "happy", "sad"]
