"""The audit's question: has an embedded backbone heard what it is tested on?"""

import json

import pytest

from ser_ray.assets import speech
from ser_ray.assets.pretraining_overlap import pretraining_overlap
from ser_ray.corpora import synthetic
from ser_ray.errors import UserError
from ser_ray.models import backbones

NAME = "embedded/mine"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """An embedded backbone that says that it was trained."""
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "recipe.json").write_text(json.dumps({"seed": 3}))
    monkeypatch.setattr(backbones, "ASSETS", tmp_path)
    return directory


def test_nothing_is_shared(trained):
    assert pretraining_overlap([NAME, "openai/whisper-base"], ["synthetic"]) == []
    assert not any(speech.can_say(sentence) for sentence in synthetic.SENTENCES)


def test_a_sentence_that_could_be_drawn_is_found(trained, monkeypatch):
    words = synthetic.SENTENCES[3].rstrip(".").lower()
    monkeypatch.setattr(speech, "LEXICON", {**speech.LEXICON, "en": words})
    assert pretraining_overlap([NAME], ["ravdess"]) == [], "the corpus that it is about is not used"
    (line,) = pretraining_overlap([NAME], ["synthetic", "ravdess"])
    assert line.startswith(f"{NAME}: 1 sentences, 0 speakers")


def test_a_speaker_of_the_demo_is_found(trained, monkeypatch):
    own = speech.draw_speaker

    def borrowed(seed, number):
        assert seed == 3
        return synthetic.draw_speaker(0, 5) if number == 7 else own(seed, number)

    monkeypatch.setattr(speech, "draw_speaker", borrowed)
    assert pretraining_overlap([NAME], ["synthetic"]) == [f"{NAME}: 0 sentences, 1 speakers of the synthetic corpus"]


def test_an_unknown_name_is_refused(trained):
    with pytest.raises(UserError, match="not embedded"):
        pretraining_overlap(["embedded/huge"], ["synthetic"])
