"""The card of an export: what its head says to the hub, and what its text says to people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backbone_fixtures import experiment
from huggingface_hub import ModelCard
from report_fixtures import predictions

from ser_ray.evaluation.summary import summarise
from ser_ray.exporting import adapter, huggingface
from ser_ray.exporting.card import card
from ser_ray.exporting.proof import Difference, Proof
from ser_ray.models.classifier import build
from ser_ray.models.pretrained import on_hub, shown

PROOF = Proof("dev utterances of x", 2e-2, Difference(140, 3.2e-3, 1.1e-4, 0.993, 0.7012, 0.6987))
ABOUT = {"version": "0.2.0", "notes": ["Added to the original weights."]}


def records(folder: Path, leaky: bool = False) -> Path:
    """A results folder with what `evaluate` writes; returns its best/."""
    protocol = {"description": "speaker_kfold, fold 0 of 6"}
    for split, seed in (("dev", 1), ("test", 2)):
        record = summarise(predictions(seed), protocol, leaky)
        (folder / "evaluation").mkdir(parents=True, exist_ok=True)
        (folder / "evaluation" / f"{split}.json").write_text(json.dumps(record))
    (folder / "evaluation" / "choice.json").write_text(json.dumps({"metric": "dev_uar"}))
    (folder / "best").mkdir()
    return folder / "best"


@pytest.fixture(scope="module")
def model(backbones_dir):
    corpora = {"ravdess": None, "mine": "/data/mine"}
    return build(experiment(backbones_dir / "whisper", corpora=corpora, adapter={"method": "lora", "rank": 2}))


@pytest.mark.parametrize("leaky", [False, True])
def test_the_head_has_the_metrics_with_intervals_and_the_protocol(model, tmp_path, leaky):
    text = card(huggingface, model, records(tmp_path, leaky), ABOUT, PROOF)
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name, data.model_name) == ("audio-classification", "transformers", "tiny")
    test = json.loads((tmp_path / "evaluation" / "test.json").read_text())
    (uar,) = (one for one in data.eval_results if one.metric_name == "UAR")
    assert uar.metric_value == pytest.approx(test["uar"], abs=1e-4)
    assert uar.metric_args["ci95"] == pytest.approx(test["ci95"]["uar"], abs=1e-4)
    assert uar.dataset_args == {"protocol": "speaker_kfold, fold 0 of 6", "leaky": leaky}
    assert ("**LEAKY" in text) is leaky
    assert f"{test['uar']:.3f} [{test['ci95']['uar'][0]:.3f}, {test['ci95']['uar'][1]:.3f}]" in text


def test_the_text_says_what_a_user_has_to_know(model, backbones_dir, tmp_path):
    text = card(huggingface, model, records(tmp_path), ABOUT, PROOF)
    for said in (
        "at most 3.2e-03",
        "on average (limit 0.02)",
        "99.3% of the recordings get the same emotion",
        "0.7012 for the checkpoint and 0.6987 for this export",
        "- Added to the original weights.",
        "Art. 5(1)(f)",
        "Art. 50(3)",
        "Acted speech (ravdess)",
        "Whether the speech of mine is acted or spontaneous is not known",
        "Corpus ravdess: CC BY-NC-SA 4.0.",
        "Corpus mine: not recorded.",
        "Emotions: angry, happy, sad.",
        "Speakers of test: 10 (",
        'pipeline("audio-classification", model="THIS_DIRECTORY", trust_remote_code=True)',
    ):
        assert said in text, said
    assert str(backbones_dir) not in text
    assert "/data/mine" not in text


def test_without_an_evaluation_it_claims_none(model, tmp_path):
    (tmp_path / "epoch_003").mkdir()
    (tmp_path / "epoch_003" / "metrics.json").write_text(json.dumps({"dev_uar": 0.61}))
    text = card(adapter, model, tmp_path / "epoch_003", ABOUT, PROOF)
    assert ModelCard(text).data.eval_results is None
    assert "UAR 0.610, without intervals" in text
    assert "metrics on unheard speech are unknown" in text
    assert ModelCard(text).data.library_name == "peft"


@pytest.mark.parametrize(
    ("backbone", "name", "there"),
    [
        ("openai/whisper-base", "openai/whisper-base", True),
        ("embedded/tiny-whisper", "embedded/tiny-whisper", False),
        ("/models/anna/whisper", "whisper", False),
        ("../whisper", "whisper", False),
    ],
)
def test_a_place_on_a_disk_is_not_named(backbone, name, there):
    assert shown(backbone) == name
    assert on_hub(backbone) is there


def test_a_licence_that_a_backbone_states_is_passed_on(backbones_dir, tmp_path):
    from backbone_fixtures import write_backbone

    own = write_backbone("whisper", tmp_path / "own")
    (own / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\n# A backbone\n")
    text = card(huggingface, build(experiment(own)), records(tmp_path / "search"), ABOUT, PROOF)
    assert "Backbone own: apache-2.0." in text
    text = card(huggingface, build(experiment("embedded/tiny-whisper")), tmp_path / "search" / "best", ABOUT, PROOF)
    assert "Backbone embedded/tiny-whisper: Apache-2.0, as ser_ray." in text
