"""An ensemble as one graph: it answers as the checkpoint, knows voices and sets, and has a shared backbone once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
import torch
from backbone_fixtures import WIDTH, noise, trained
from safetensors.torch import load_file, save_file

from ser_ray import export
from ser_ray.__main__ import main
from ser_ray.exporting import Options, graph, merged
from ser_ray.exporting.recordings import Recordings
from ser_ray.models.ensemble import Ensemble

RATE = 16_000
WEIGHTS, TEMPERATURE, LEAST = (0.5, 0.2, 0.3), 4.0, 0.1
LORA = {"method": "lora", "rank": 2, "alpha": 4}
FROZEN = {"method": "frozen"}


@pytest.fixture(scope="module")
def best(backbones_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads on the same frozen Whisper, of which the first needs one block, and the second all of them and what is
    known of a speaker, and an adapted HuBERT, which uses that too."""
    directory = tmp_path_factory.mktemp("search") / "best"
    members: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("whisper", FROZEN, {"layer_mix": "weighted", "pooling": "attentive"}),
        ("whisper", FROZEN, {"speaker": "center", "layer_mix": "concat", "pooling": "statistics"}),
        ("hubert-noproj", LORA, {"speaker": "standardize", "pooling": "mean"}),
    )
    rows = []
    for number, (backbone, adapter, head) in enumerate(members, start=1):
        name = f"members/{number:02}"
        audio = {"max_seconds": 2.0}
        trained(directory / name, backbones_dir / backbone, adapter=adapter, head=head, audio=audio)
        (directory / name / "calibration.json").write_text(json.dumps({"temperature": 0.5 * number}))
        rows.append({"directory": name, "weight": WEIGHTS[number - 1]})
    first = directory / "members" / "01" / "head.safetensors"
    weights = load_file(first)
    weights["mix_L"].zero_()[1] = 1.0
    save_file(weights, first)
    content = {"members": rows, "temperature": TEMPERATURE, "least_probability": LEAST}
    (directory / "ensemble.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def exported(best: Path) -> Path:
    """Its export, by the command."""
    waveform_BT, _ = noise((0.6, 0.9))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "recordings_for", lambda *_: Recordings("noise", list(waveform_BT.numpy())))
        assert main(["export", str(best), "--to", "onnx"]) == 0
    return best.with_name("best-onnx")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short ones, and one that is cut into windows."""
    folder = tmp_path_factory.mktemp("recordings")
    waveform_BT, lengths_B = noise((0.5, 1.1, 4.5), seed=1)
    for number, (waveform_T, length) in enumerate(zip(waveform_BT.numpy(), lengths_B, strict=True)):
        soundfile.write(folder / f"{number}.wav", waveform_T[:length], RATE)
    return sorted(folder.iterdir())


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["predict", *map(str, arguments), "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_is_proven_and_described(exported: Path) -> None:
    about, card = json.loads((exported / "export.json").read_text()), (exported / "README.md").read_text()
    assert about["proof"]["limit"] == 1e-4
    assert about["proof"]["largest"] < 1e-5
    assert "the product of the calibrated probabilities of 3 models, whisper (frozen), whisper (frozen), hubert" in card
    assert card.count("- Backbone ") == 2


@pytest.mark.parametrize("with_voice", [False, True])
def test_predict_and_its_sets_are_those_of_the_ensemble(
    best: Path,
    exported: Path,
    recordings: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    with_voice: bool,
) -> None:
    more: list[object] = ["--sets"]
    if with_voice:
        more += ["--voice", tmp_path / "anna.json"]
        assert main(["enrol", str(best), *map(str, recordings), "--output", str(tmp_path / "anna.json")]) == 0
    expected, found = (lines(capsys, model, *recordings, *more) for model in (best, exported))
    assert len(found) == 2 + 3 + 1
    for one, other in zip(found, expected, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert one["set"] == other["set"]
    assert {len(one["set"]) for one in found} != {1}, "else nothing is said of the threshold"
    if with_voice:
        without = lines(capsys, exported, *recordings)
        assert any(
            abs(found[0]["probabilities"][e] - without[0]["probabilities"][e]) > 1e-3
            for e in without[0]["probabilities"]
        )


def test_a_frozen_backbone_that_members_share_is_in_it_once(exported: Path) -> None:
    shapes = [tuple(one.dims) for one in onnx.load(exported / "model.onnx").graph.initializer]
    assert shapes.count((WIDTH, 80, 3)) == 1  # the first convolution of Whisper
    assert shapes.count((1500, WIDTH)) <= 1  # its positions


def test_it_is_the_product_by_hand(best: Path) -> None:
    """Of what every member says by itself, without the rule that one softmax is enough."""
    model = merged.all_merged(best, Options())
    assert isinstance(model, Ensemble)
    batch = noise((0.6, 0.9))
    logs = 0.0
    with torch.inference_mode():
        for member, weight in zip(model.members, WEIGHTS, strict=True):
            logs = logs + weight * member.probabilities(member(*batch)).log().numpy()
        found = graph.Answering(model)(*batch)[0].numpy()
    expected = np.exp(logs / TEMPERATURE)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("to", ["hf", "peft", "page"])
def test_other_formats_name_onnx_and_the_members(best: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(best), "--to", to]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--to {to}: {best} is an ensemble" in line
    assert line.endswith(f"{best}/members/01")
