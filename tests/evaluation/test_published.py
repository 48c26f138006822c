"""Published figures appear beside runs of the same corpus, protocol and emotions, and beside no others."""

import json

import pytest

from ser_ray import corpora
from ser_ray.config import Protocol, to_dict
from ser_ray.evaluation.published import ROWS, matching
from ser_ray.schema import EMOTIONS

EIGHT = [emotion for emotion in EMOTIONS if emotion != "boredom"]
SIX = ["angry", "disgust", "fear", "happy", "neutral", "sad"]
EMOBOX = to_dict(Protocol(scheme="given_folds", given="emobox")) | {"description": "fold 0"}


def names(*case, leaky=False):
    return [row["name"] for row in matching(*case, leaky)]


def test_emobox_beside_its_own_folds_with_all_eight_emotions():
    found = matching(["ravdess"], EMOBOX, EIGHT, leaky=False)
    assert {row["name"].split(",")[0]: (row["uar"], row["accuracy"]) for row in found} == {
        "wav2vec2-base": (0.543, 0.554),
        "HuBERT-base": (0.654, 0.662),
        "HuBERT-large": (0.700, 0.703),
        "WavLM-large": (0.720, 0.722),
        "Whisper-large-v3": (0.753, 0.759),
    }
    assert all("2406.07162" in row["source"] and "six folds" in row["note"] for row in found)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("of", "protocol", "emotions", "leaky"),
    [
        (["ravdess"], EMOBOX, EIGHT[:-1], False),  # calm merged into neutral
        (["ravdess"], EMOBOX, EIGHT, True),
        (["ravdess"], to_dict(Protocol()), EIGHT, False),
        (["ravdess"], to_dict(Protocol(scheme="given_folds", given=(("ravdess/01",),))), EIGHT, False),
        (["ravdess", "tess"], EMOBOX, EIGHT, False),
        (["crema_d"], EMOBOX, EIGHT, False),
        (["emodb"], to_dict(Protocol()), SIX, False),
        ([], EMOBOX, EIGHT, False),
    ],
)
def test_nothing_beside_another_protocol(of, protocol, emotions, leaky):
    assert matching(of, protocol, emotions, leaky) == []


def test_people_are_beside_every_protocol_and_shared_speakers_beside_leaky_runs_alone():
    fair, leaky = (names(["crema_d"], to_dict(Protocol(scheme=scheme)), SIX, leaky=leaky)
                   for scheme, leaky in (("speaker_kfold", False), ("random", True)))  # fmt: skip
    assert [name.split(",")[0] for name in fair] == ["people", "people"]
    assert leaky[-2:] == fair
    assert len(leaky) == 7
    assert len(names(["tess"], to_dict(Protocol(scheme="random")), [*SIX, "surprised"], leaky=True)) == 5


def test_the_table_speaks_the_words_of_the_project():
    for row in ROWS:
        assert row.corpus in corpora.NAMES
        assert row.emotions < set(EMOTIONS)
        assert row.source
        assert row.note
        Protocol.model_validate(dict(row.protocol))
        metrics = [value for value in (row.uar, row.accuracy) if value is not None]
        assert metrics
        assert all(0 < value <= 1 for value in metrics)
