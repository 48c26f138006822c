"""Folds: no speaker on two sides, every utterance tested once, the same whatever the order of the rows."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.config import Protocol
from ser_ray.protocols.folds import EMOBOX_RAVDESS, labelled, make_fold
from ser_ray.schema import SPLITS, Fold, UserError

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


@settings(deadline=None)
@given(table=utterances_of_speakers(), folds=st.integers(3, 6), seed=st.integers(0, 3))
def test_speaker_kfold_shares_no_speaker_and_tests_every_utterance_once(table, folds, seed):
    tested: Counter[str] = Counter()
    validated: Counter[str] = Counter()
    for number in range(folds):
        fold = make_fold(table, Protocol(folds=folds, fold=number, seed=seed))
        one, two, three = speakers_by_split(table, fold).values()
        assert not (one & two)
        assert not (one & three)
        assert not (two & three)
        assert one
        assert two
        assert three
        assert not fold.leaky
        tested.update(key for key, split in fold.splits.items() if split == "test")
        validated.update(key for key, split in fold.splits.items() if split == "dev")
    assert tested == validated == Counter(table["utterance_id"].to_pylist())


@settings(deadline=None, max_examples=50)
@given(
    table=utterances_of_speakers(),
    order=st.randoms(),
    scheme=st.sampled_from(["speaker_kfold", "random"]),
    seed=st.integers(0, 3),
)
def test_folds_do_not_depend_on_the_order_of_rows(table, order, scheme, seed):
    rows = list(range(table.num_rows))
    order.shuffle(rows)
    protocol = Protocol(scheme=scheme, folds=3, seed=seed)
    assert make_fold(table.take(rows), protocol) == make_fold(table, protocol)


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
        (1, 5, "1 speakers do not fill 5 .* add a corpus, or set protocol.scheme to random"),
        (2, 3, "add a corpus"),
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
