"""The embedded backbones as they lie in the package: small, plain, trained by the recipe that is told beside them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from recipes.embedded import recipe, speech
from ser_ray.disk import read_json
from ser_ray.models import backbones, pretrained, pretraining
from ser_ray.models.pretraining import pretraining_overlap

NAMES = ("embedded/tiny-whisper", "embedded/tiny-wav2vec2")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_small_enough_for_a_repository(name):
    directory = pretrained.embedded_directory(name)
    assert sum(p.numel() for p in backbones.load(name).parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8_000_000
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_automodel_loads_it(name):
    directory = str(pretrained.embedded_directory(name))
    model, told = AutoModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    encoder = getattr(model, "encoder" if "whisper" in name else "base_model")
    own = backbones.load(name).model.state_dict()
    theirs = encoder.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    assert not [key for key in told["missing_keys"] if not key.startswith("decoder.")], (
        "Whisper's decoder alone is not there"
    )
    assert not told["unexpected_keys"]


def test_its_recipe_is_told_and_is_that_of_the_checkout(name):
    directory = pretrained.embedded_directory(name)
    told = read_json(directory / "recipe.json")
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == told["sha256"]
    assert told["steps_done"] == told["steps"]
    assert read_json(directory / "config.json") == recipe.ARCHITECTURES[told["family"]]
    assert read_json(directory / pretraining.FILE) == speech.pretrained_on(told["seed"])


def test_its_card_tells_the_recipe(name):
    directory = pretrained.embedded_directory(name)
    card, told = (directory / "README.md").read_text(), read_json(directory / "recipe.json")
    assert f"--family {told['family']} --speech DIR --steps {told['steps']} --threads {told['threads']}" in card
    assert f"{told['parameters'] / 1e6:.2f} M parameters" in card
    assert f"{told['hours']:g} hours of espeak-ng" in card
    for subject in ("architecture", "training data", "recipe", "on real speech", "licence", "Limits"):
        assert subject in card


def test_no_sentence_and_no_speaker_of_the_demo_was_heard(name):
    told = read_json(pretrained.embedded_directory(name) / "recipe.json")
    said = speech.sentences(told["seed"], told["drawn"])
    assert len(said) == told["drawn"]
    assert speech.shared_with_demo(said) == []
    assert pretraining_overlap([name], ["synthetic"]) == []
