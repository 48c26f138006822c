"""File names of EmoDB, SAVEE, RAVDESS's song and all of CREMA-D's grammar; what differs from the published counts."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from ser_ray import corpora
from ser_ray.corpora import crema_d, emodb, ravdess, ravdess_song, savee, tess
from ser_ray.corpora.describe import describe, differences
from ser_ray.schema import Utterance


def touch(directory: Path, names: list[str]) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def test_crema_d_reads_every_name_of_its_grammar(tmp_path):
    """82 an actor: one sentence in three levels, the others in one; of 7462 such names 7442 were published."""
    names = []
    for actor, sentence, emotion in product(crema_d.ACTORS, crema_d.SENTENCES, crema_d.EMOTIONS):
        levels = ("LO", "MD", "HI") if sentence == "IEO" and emotion != "NEU" else ("XX",)
        names += [f"AudioWAV/{actor}_{sentence}_{emotion}_{level}.wav" for level in levels]
    assert len(names) == 91 * 82
    utterances, rejected = corpora.read("crema_d", touch(tmp_path, names))
    assert rejected == []
    assert len(utterances) == 7462
    assert Counter(u.intensity for u in utterances) == {"low": 455, "medium": 455, "high": 455, None: 6097}
    assert set(Counter(u.speaker for u in utterances).values()) == {82}
    assert "7462 utterances of 7442 published" in differences("crema_d", describe(utterances))


def test_ravdess_song_reads_all_published_names(tmp_path):
    names = [
        f"Actor_{actor:02}/03-02-{emotion:02}-{intensity:02}-{statement:02}-{repetition:02}-{actor:02}.wav"
        for actor, emotion, intensity, statement, repetition in product(range(1, 25), range(1, 7), *[(1, 2)] * 3)
        if actor != 18 and not (emotion == 1 and intensity == 2)
    ]
    utterances, rejected = corpora.read("ravdess_song", touch(tmp_path, names))
    assert rejected == []
    assert differences("ravdess_song", describe(utterances)) == []
    assert {u.speaker for u in utterances} == {f"ravdess/{a:02}" for a in range(1, 25) if a != 18}
    with pytest.raises(ValueError, match="song"):
        ravdess.parse(Path(names[0]))


def test_who_sings_is_who_speaks():
    """Under one name, so that no fold over both corpora has an actor on two sides."""
    spoken, sung = ravdess.parse(Path("03-01-05-01-02-01-12.wav")), ravdess_song.parse(Path("03-02-05-01-02-01-12.wav"))
    assert spoken.speaker == sung.speaker
    assert (sung.corpus, sung.utterance_id) == ("ravdess_song", "ravdess_song/03-02-05-01-02-01-12")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("03-01-05-01-01-01-12", "speech"),
        ("03-02-07-01-01-01-12", "disgust was not sung"),
        ("03-02-05-01-01-01-18", "actor 18"),
    ],
)
def test_ravdess_song_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        ravdess_song.parse(Path(f"{name}.wav"))


@pytest.mark.parametrize("layout", ["AudioData/{speaker}/{code}{number:02}.wav", "ALL/{speaker}_{code}{number:02}.wav"])
def test_savee_reads_all_published_names_in_both_layouts(tmp_path, layout):
    names = [
        layout.format(speaker=speaker, code=code, number=number)
        for speaker in savee.SPEAKERS
        for code, count in savee.SENTENCES.items()
        for number in range(1, count + 1)
    ]
    utterances, rejected = corpora.read("savee", touch(tmp_path, names))
    assert rejected == []
    assert len(utterances) == 480
    assert differences("savee", describe(utterances)) == []
    assert Counter(u.speaker for u in utterances) == dict.fromkeys((f"savee/{s}" for s in savee.SPEAKERS), 120)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DC/a16", "sentence 16"),
        ("DC/a00", "sentence 00"),
        ("DC/x01", "emotion 'x'"),
        ("XX/a01", "speaker 'XX'"),
        ("DC/JK_a01", "folder DC"),
        ("DC/a1", "not emotion and number"),
    ],
)
def test_savee_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        savee.parse(Path(f"{name}.wav"))


def test_emodb_reads_every_name_of_its_grammar():
    for speaker, sentence, letter, version in product(emodb.SPEAKERS, emodb.SENTENCES, emodb.EMOTIONS, "abcdef"):
        utterance = emodb.parse(Path(f"wav/{speaker}{sentence}{letter}{version}.wav"))
        assert utterance.speaker == f"emodb/{speaker}"
        assert utterance.emotion == emodb.EMOTIONS[letter]
    assert sum(emodb.PUBLISHED["emotions"].values()) == 535
    assert Counter(emodb.SPEAKERS.values()) == {"female": 5, "male": 5}


@pytest.mark.parametrize(("name", "reason"), [("04a01Fa", "speaker 04"), ("03a03Fa", "sentence a03"), ("03a01Xa", "X")])
def test_emodb_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        emodb.parse(Path(f"{name}.wav"))


@pytest.mark.corpus
def test_emodb_reads_the_real_corpus(shared_data):
    utterances, rejected = corpora.read("emodb", shared_data / "emodb")
    assert rejected == []
    assert differences("emodb", describe(utterances)) == []


def test_tess_knows_both_spellings_of_folders_and_sees_a_contradiction():
    for folder, name, emotion in (
        ("OAF_Fear", "OAF_back_fear", "fear"),
        ("OAF_Pleasant_surprise", "OAF_back_ps", "surprised"),
        ("YAF_pleasant_surprised", "YAF_back_ps", "surprised"),
        ("OAF_neutral", "OA_bite_neutral", "neutral"),
        ("TESS Toronto emotional speech set data", "YAF_dog_sad", "sad"),
    ):
        assert tess.parse(Path(f"{folder}/{name}.wav")).emotion == emotion
    with pytest.raises(ValueError, match="the name says OAF, fear, the folder OAF, sad"):
        tess.parse(Path("OAF_Sad/OAF_back_fear.wav"))


def test_differences_name_what_is_missing_and_what_is_more():
    utterances = [Utterance(f"tess/{n}", "tess", "tess/OAF", "angry", f"{n}.wav") for n in range(401)]
    found = differences("tess", describe(utterances))
    assert found[:3] == ["401 utterances of 2800 published", "1 speakers of 2 published", "401 angry of 400"]
    assert differences("mine", describe(utterances)) == []
    assert describe(utterances[:2], {"tess/0": 1800, "tess/1": 1800})["hours"] == 1
