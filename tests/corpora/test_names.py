"""Every corpus's file names: all that were published are read, all others are rejected with a reason."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray import corpora
from ser_ray.corpora import crema_d, ravdess, tess
from ser_ray.schema import Utterance

RAVDESS = Path(__file__).parents[2].parent / "shared" / "data" / "ravdess"


def published_ravdess():
    fields = product(range(1, 25), range(1, 9), (1, 2), (1, 2), (1, 2))
    return [
        f"Actor_{actor:02}/03-01-{emotion:02}-{intensity:02}-{statement:02}-{repetition:02}-{actor:02}.wav"
        for actor, emotion, intensity, statement, repetition in fields
        if not (emotion == 1 and intensity == 2)
    ]


def check_ravdess(utterances):
    assert len(utterances) == len({u.utterance_id for u in utterances}) == 1440
    others = dict.fromkeys(("calm", "happy", "sad", "angry", "fear", "disgust", "surprised"), 192)
    assert Counter(u.emotion for u in utterances) == {"neutral": 96, **others}
    assert set(Counter(u.speaker for u in utterances).values()) == {60}
    assert {u.speaker for u in utterances} == {f"ravdess/{actor:02}" for actor in range(1, 25)}
    assert Counter(u.gender for u in utterances) == {"male": 720, "female": 720}
    assert Counter(u.text_id for u in utterances) == {"01": 720, "02": 720}
    assert Counter(u.intensity for u in utterances) == {"normal": 768, "strong": 672}


def test_ravdess_reads_all_published_names(tmp_path):
    for name in published_ravdess():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    utterances, rejected = corpora.read("ravdess", tmp_path)
    assert rejected == []
    check_ravdess(utterances)


@pytest.mark.corpus
def test_ravdess_reads_the_real_corpus():
    if not RAVDESS.is_dir():
        pytest.skip("no ../shared/data/ravdess beside the checkout")
    utterances, rejected = corpora.read("ravdess", RAVDESS)
    assert rejected == []
    check_ravdess(utterances)
    assert all((RAVDESS / u.path).is_file() for u in utterances)


def test_ravdess_reads_every_field():
    assert ravdess.parse(Path("x/Actor_12/03-01-06-02-01-02-12.wav")) == Utterance(
        utterance_id="ravdess/03-01-06-02-01-02-12",
        corpus="ravdess",
        speaker="ravdess/12",
        emotion="fear",
        path="x/Actor_12/03-01-06-02-01-02-12.wav",
        text_id="01",
        intensity="strong",
        gender="female",
        language="en",
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("03-01-05-01-02-01.wav", "seven two-digit numbers"),
        ("03-01-05-01-02-01-12-1.wav", "seven two-digit numbers"),
        ("03-01-05-01-02-01-1².wav", "seven two-digit numbers"),
        ("03-02-05-01-02-01-12.wav", "song"),
        ("01-01-05-01-02-01-12.wav", "audio-video"),
        ("02-01-05-01-02-01-12.wav", "modality 02"),
        ("04-01-05-01-02-01-12.wav", "modality 04 does not exist"),
        ("03-03-05-01-02-01-12.wav", "channel 03 does not exist"),
        ("03-01-09-01-02-01-12.wav", "emotion 09 does not exist"),
        ("03-01-05-03-02-01-12.wav", "intensity 03 does not exist"),
        ("03-01-05-01-03-01-12.wav", "statement 03 does not exist"),
        ("03-01-05-01-02-03-12.wav", "repetition 03 does not exist"),
        ("03-01-05-01-02-01-25.wav", "actor 25 does not exist"),
        ("03-01-05-01-02-01-00.wav", "actor 00 does not exist"),
        ("Actor_11/03-01-05-01-02-01-12.wav", "the name says actor 12, the folder Actor_11"),
        ("Actor_11/copy/03-01-05-01-02-01-12.wav", "the folder Actor_11"),
    ],
)
def test_ravdess_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        ravdess.parse(Path(name))


@pytest.mark.parametrize(
    ("name", "speaker", "emotion", "intensity"),
    [
        ("1001_DFA_ANG_XX.wav", "1001", "angry", None),
        ("AudioWAV/1091_WSI_SAD_XX.wav", "1091", "sad", None),
        ("1040_ITH_SAD_X.wav", "1040", "sad", None),
        ("1002_IEO_FEA_HI.wav", "1002", "fear", "high"),
        ("1002_IEO_DIS_LO.wav", "1002", "disgust", "low"),
        ("1002_IEO_HAP_MD.flac", "1002", "happy", "medium"),
        ("1002_IOM_NEU_XX.wav", "1002", "neutral", None),
    ],
)
def test_crema_d_reads(name, speaker, emotion, intensity):
    path = Path(name)
    assert crema_d.parse(path) == Utterance(
        utterance_id=f"crema_d/{path.stem}",
        corpus="crema_d",
        speaker=f"crema_d/{speaker}",
        emotion=emotion,
        path=name,
        text_id=path.stem.split("_")[1],
        intensity=intensity,
        language="en",
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("1001_DFA_ANG.wav", "the name is not"),
        ("1001_DFA_ANG_XX_1.wav", "the name is not"),
        ("1000_DFA_ANG_XX.wav", "actor '1000' does not exist; known: 1001 to 1091"),
        ("1092_DFA_ANG_XX.wav", "actor '1092'"),
        ("1001_ABC_ANG_XX.wav", "sentence 'ABC'"),
        ("1001_DFA_SUR_XX.wav", "emotion 'SUR' does not exist; known: ANG, DIS, FEA, HAP, NEU, SAD"),
        ("1001_DFA_ANG_MX.wav", "level 'MX'"),
    ],
)
def test_crema_d_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        crema_d.parse(Path(name))


def test_tess_reads_as_many_as_were_published(tmp_path):
    words = ["".join(letters) for letters in product("bdgkm", "aeiou", "lnrst", "kt")][:200]
    for speaker, emotion in product(("OAF", "YAF"), ("angry", "disgust", "fear", "happy", "neutral", "ps", "sad")):
        folder = tmp_path / f"{speaker}_{emotion}"
        folder.mkdir()
        for word in words:
            short = "OA" if (speaker, word, emotion) == ("OAF", words[0], "neutral") else speaker
            (folder / f"{short}_{word}_{emotion}.wav").touch()
    utterances, rejected = corpora.read("tess", tmp_path)
    assert rejected == []
    assert len(utterances) == 2800
    assert Counter(u.speaker for u in utterances) == {"tess/OAF": 1400, "tess/YAF": 1400}
    assert set(Counter(u.emotion for u in utterances).values()) == {400}
    assert {u.text_id for u in utterances} == set(words)
    assert {u.gender for u in utterances} == {"female"}


@pytest.mark.parametrize(
    ("name", "speaker", "word", "emotion"),
    [
        ("OAF_back_angry.wav", "OAF", "back", "angry"),
        ("YAF_dog_ps.wav", "YAF", "dog", "surprised"),
        ("YAF_dog_pleasant_surprise.wav", "YAF", "dog", "surprised"),
        ("OAF_Pool_Pleasant_Surprised.wav", "OAF", "pool", "surprised"),
        ("OA_bite_neutral.wav", "OAF", "bite", "neutral"),
    ],
)
def test_tess_reads(name, speaker, word, emotion):
    utterance = tess.parse(Path(name))
    assert (utterance.speaker, utterance.text_id, utterance.emotion) == (f"tess/{speaker}", word, emotion)
    assert utterance.utterance_id == f"tess/{Path(name).stem}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("OAF_back.wav", "the name is not"),
        ("OAF_back_2_angry.wav", "the name is not"),
        ("MAF_back_angry.wav", "speaker 'MAF' does not exist; known: OAF, OA, YAF"),
        ("OAF_back_calm.wav", "emotion 'calm' does not exist"),
        ("OAF_back_surprise_pleasant.wav", "emotion 'surprise_pleasant'"),
    ],
)
def test_tess_rejects(name, reason):
    with pytest.raises(ValueError, match=reason):
        tess.parse(Path(name))


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="/\0"), min_size=1).filter(lambda text: text.strip(".")))
def test_no_name_is_guessed(stem):
    """Whatever the name, it is an utterance of the corpus under its own id, or a ValueError with a reason."""
    for module in (ravdess, crema_d, tess):
        path = Path(f"{stem}.wav")
        try:
            assert module.parse(path).utterance_id.endswith(f"/{path.stem}")
        except ValueError as reason:
            assert len(str(reason)) > 10  # noqa: PT017
