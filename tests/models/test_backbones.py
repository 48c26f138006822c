"""Backbones: transformers' own result without padding, the same result with it, and errors that name the mistake."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from backbone_fixtures import LAYERS, VARIANTS, WIDTH, experiment, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ser_ray.models import backbones
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import SAMPLING_RATE, UserError

WAVEFORM_FAMILIES = [v for v in VARIANTS if v != "whisper"]


# -- parity


@pytest.mark.parametrize("variant", WAVEFORM_FAMILIES)
@torch.inference_mode()
def test_without_padding_all_states_are_those_of_transformers(backbones_dir: Path, variant: str) -> None:
    directory = backbones_dir / variant
    ours, theirs = backbones.load(str(directory)).eval(), AutoModel.from_pretrained(directory).eval()
    extractor = AutoFeatureExtractor.from_pretrained(directory)
    waveform_BT, lengths_B = noise([1.1, 1.1, 1.1])
    hiddens, mask_BF = ours(waveform_BT, lengths_B)
    values = extractor(list(waveform_BT.numpy()), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_values
    reference = theirs(values, output_hidden_states=True)
    assert len(hiddens) == LAYERS + 1
    assert mask_BF.all()
    torch.testing.assert_close(hiddens[-1], reference.last_hidden_state, atol=2e-5, rtol=1e-5)
    for layer, (own, other) in enumerate(zip(hiddens[:-1], reference.hidden_states[:-1], strict=True)):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-5, msg=lambda m, layer=layer: f"layer {layer}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_the_frames_of_all_states_lie_one_after_the_other(backbones_dir: Path, variant: str) -> None:
    """Blocks keep the order of their input, and a norm copies any other: 7 % of a training step of Whisper once."""
    hiddens, _ = backbones.load(str(backbones_dir / variant)).eval()(*noise([1.1, 0.9]))
    assert [hidden_BFD.is_contiguous() for hidden_BFD in hiddens] == [True] * (LAYERS + 1)


@torch.inference_mode()
def test_whisper_at_thirty_seconds_is_that_of_transformers(backbones_dir: Path) -> None:
    directory = backbones_dir / "whisper"
    ours, theirs = backbones.load(str(directory)).eval(), WhisperEncoder.from_pretrained(directory).eval()
    extractor = AutoFeatureExtractor.from_pretrained(directory)
    waveform_BT, lengths_B = noise([30.0])
    hiddens, mask_BF = ours(waveform_BT, lengths_B)
    features = extractor(waveform_BT[0].numpy(), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
    reference = theirs(features, output_hidden_states=True)
    assert mask_BF.shape == (1, 1500)
    assert mask_BF.all()
    torch.testing.assert_close(hiddens[-1], reference.last_hidden_state, atol=5e-5, rtol=1e-5)
    for own, other in zip(hiddens[:-1], reference.hidden_states[:-1], strict=True):
        torch.testing.assert_close(own, other, atol=5e-5, rtol=1e-5)


def test_whisper_refuses_more_than_its_positions(backbones_dir: Path) -> None:
    whisper = backbones.load(str(backbones_dir / "whisper"))
    with pytest.raises(ValueError, match="30 s"):
        whisper(torch.zeros(1, 480_001), torch.tensor([480_001]))


def test_a_whole_whisper_checkpoint_gives_its_encoder(backbones_dir: Path, tmp_path: Path) -> None:
    """Hub checkpoints hold a decoder too, and prefix the encoder's names."""
    directory = shutil.copytree(backbones_dir / "whisper", tmp_path / "whole")
    encoder = load_file(directory / "model.safetensors")
    whole = {f"model.encoder.{name}": value for name, value in encoder.items()}
    save_file(
        whole | {"model.decoder.layer_norm.weight": torch.ones(WIDTH)},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    loaded = backbones.load(str(directory)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.items())


def test_a_wav2vec2_checkpoint_with_a_task_gives_its_encoder(backbones_dir: Path, tmp_path: Path) -> None:
    """Hub checkpoints carry heads, a prefix, the older names of weight norm, and may lack what only they need."""
    directory = shutil.copytree(backbones_dir / "wav2vec2-layer", tmp_path / "task")
    encoder = load_file(directory / "model.safetensors")
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    whole = {"lm_head.weight": torch.ones(32, WIDTH), "quantizer.codevectors": torch.ones(1, 4, 8)}
    for name, value in encoder.items():
        for new, old in older.items():
            name = name.replace(new, old)
        if name != "masked_spec_embed":
            whole[f"wav2vec2.{name}"] = value
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    assert any("weight_g" in name for name in whole)
    loaded = backbones.load(str(directory)).model.state_dict()
    assert all(torch.equal(loaded[name], encoder[name]) for name in encoder if name != "masked_spec_embed")


# -- padding


@cache
def _classifier(directory: Path) -> EmotionClassifier:
    return build(experiment(directory, adapter={"method": "frozen"}, head={"pooling": "attentive"})).eval()


def _assert_independent_of_batch(model: EmotionClassifier, seconds: list[float]) -> None:
    with torch.inference_mode():
        waveform_BT, lengths_B = noise(seconds)
        together_BK = model(waveform_BT, lengths_B)
        for row, length in enumerate(lengths_B.tolist()):
            alone_K = model(waveform_BT[row : row + 1, :length], lengths_B[row : row + 1])[0]
            torch.testing.assert_close(together_BK[row], alone_K, atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_do_not_depend_on_the_batch(backbones_dir: Path, variant: str) -> None:
    _assert_independent_of_batch(_classifier(backbones_dir / variant), [0.3, 2.0, 1.17])


@pytest.mark.parametrize("variant", ["whisper", "wav2vec2-group"])
@given(lengths=st.lists(st.integers(4800, 24_000), min_size=2, max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_logits_do_not_depend_on_any_batch(backbones_dir: Path, variant: str, lengths: list[int]) -> None:
    _assert_independent_of_batch(_classifier(backbones_dir / variant), [n / SAMPLING_RATE for n in lengths])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_counts_the_frames_of_an_utterance_alone(backbones_dir: Path, variant: str) -> None:
    model = _classifier(backbones_dir / variant).backbone
    waveform_BT, lengths_B = noise([0.31, 1.7])
    _, mask_BF = model(waveform_BT, lengths_B)
    for row, length in enumerate(lengths_B.tolist()):
        hiddens, alone_1F = model(waveform_BT[row : row + 1, :length], lengths_B[row : row + 1])
        assert int(mask_BF[row].sum()) == int(alone_1F.sum()) == hiddens[0].shape[1]


# -- names and errors


def test_untrained_ones_are_drawn_by_their_seed(backbones_dir: Path) -> None:
    name = str(backbones_dir / "wav2vec2-layer")
    first, again, other = (backbones.untrained(name, seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert first.keys() == backbones.load(name).model.state_dict().keys()


def test_loading_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    backbones.load("embedded/tiny-whisper")
    assert torch.equal(torch.rand(1), expected)


def _one_line(name: str) -> str:
    with pytest.raises(UserError) as caught:
        backbones.load(name)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


@pytest.fixture
def copied(backbones_dir: Path, tmp_path: Path) -> Path:
    """A whole wav2vec2 directory, to be damaged."""
    return shutil.copytree(backbones_dir / "wav2vec2-layer", tmp_path / "damaged")


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "no such directory" in _one_line(str(tmp_path / "nowhere"))
    assert "no such directory" in _one_line("./nowhere")


def test_an_unknown_embedded_name() -> None:
    assert "embedded/tiny-whisper" in _one_line("embedded/huge")


def test_a_config_without_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    _one_line(str(copied))


def test_a_pickle_alone_is_refused(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert "safetensors" in _one_line(str(copied))


@pytest.mark.parametrize("model_type", ["bert", "made-up"])
def test_an_unsupported_architecture(copied: Path, model_type: str) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert model_type in _one_line(str(copied))


def test_a_config_that_is_no_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    _one_line(str(copied))


def test_a_missing_feature_extractor(copied: Path) -> None:
    (copied / "preprocessor_config.json").unlink()
    _one_line(str(copied))


def test_weights_cut_short(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    _one_line(str(copied))


@pytest.mark.parametrize("damage", ["deleted", "renamed", "added", "other shape"])
def test_weights_that_do_not_fit(copied: Path, damage: str) -> None:
    path, key = copied / "model.safetensors", "encoder.layers.0.attention.q_proj.weight"
    weights = load_file(path)
    if damage == "deleted":
        del weights[key]
    elif damage == "renamed":
        weights["encoder.layers.0.attention.query.weight"] = weights.pop(key)
    elif damage == "added":
        weights["encoder.layers.9.attention.q_proj.weight"] = torch.zeros(WIDTH, WIDTH)
    else:
        weights[key] = torch.zeros(WIDTH, WIDTH + 1)
    save_file(weights, path, {"format": "pt"})
    assert "do not fit" in _one_line(str(copied))


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = _one_line("nobody/no-such-backbone")
    assert "HF_HUB_OFFLINE is set" in message
    assert "give a local directory" in message
