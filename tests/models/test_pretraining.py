"""The audit's question: was an embedded backbone pre-trained on what it is tested on?"""

import json

import pytest

from ser_ray.corpora import synthetic
from ser_ray.models import pretrained, pretraining
from ser_ray.models.pretraining import pretraining_overlap, voice_key, words
from ser_ray.schema import UserError

NAME = "embedded/mine"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Writes what an embedded backbone says that it was trained on."""
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path)

    def write(lexicon: list[str], speakers: list[str]) -> None:
        content = {"words": {"en": lexicon, "de": ["hund"]}, "speakers": speakers}
        (directory / pretraining.FILE).write_text(json.dumps(content))

    write(["dog", "happy"], ["0" * 12])
    return write


def test_nothing_is_shared(trained):
    assert pretraining_overlap([NAME, "openai/whisper-base"], ["synthetic"]) == []


def test_a_sentence_that_could_be_drawn_is_found(trained):
    trained(sorted({*words(synthetic.SENTENCES[3]), "dog"}), [])
    assert pretraining_overlap([NAME], ["ravdess"]) == [], "the corpus that it is about is not used"
    assert pretraining_overlap([NAME], ["synthetic", "ravdess"]) == [
        f"{NAME}: 1 sentences, 0 speakers of the synthetic corpus"
    ]


def test_a_speaker_of_the_demo_is_found(trained):
    trained([], ["0" * 12, voice_key(synthetic.draw_speaker(0, 5).formants)])
    assert pretraining_overlap([NAME], ["synthetic"]) == [f"{NAME}: 0 sentences, 1 speakers of the synthetic corpus"]


def test_an_unknown_name_is_refused(trained):
    with pytest.raises(UserError, match="not embedded"):
        pretraining_overlap(["embedded/huge"], ["synthetic"])
