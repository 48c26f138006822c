"""The adapted layers as one operation, beside PEFT's own modules: outputs, gradients, merging, and files both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import backbone_fixtures
import pytest
import torch
from backbone_fixtures import VARIANTS, experiment, noise_batch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.lowrank import SAME_INPUT
from ser_ray.models.precision import autocast

BATCH = noise_batch((0.5, 0.83, 0.61))
Gradients = dict[str, torch.Tensor]


def _model(backbones_dir: Path, variant: str, precision: str = "fp32", **adapter: Any) -> EmotionClassifier:
    """With updates that are not zero, and in evaluation mode but for LoRA's dropout: the backbone has draws too."""
    model = build(experiment(backbones_dir / variant, adapter=adapter, precision=precision)).eval()
    torch.manual_seed(3)
    for name, module in model.named_modules():
        if name.endswith((".lora_B.default", ".lora_A.default")):
            nn.init.normal_(module.weight, std=0.1)
        if name.endswith(".lora_dropout.default"):
            module.train()
    return model


def _layers(model: EmotionClassifier) -> dict[str, Any]:
    """PEFT's."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _step(model: EmotionClassifier, seed: int = 0) -> tuple[torch.Tensor, Gradients]:
    """Logits, and the gradients of all that is trainable."""
    torch.manual_seed(seed)
    model.zero_grad()
    with autocast(model.experiment.precision, "cpu"):
        logits_BK = model(BATCH.inputs, BATCH.lengths_B)
    nn.functional.cross_entropy(logits_BK.float(), BATCH.labels_B).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits_BK.detach(), gradients


class _Columns(nn.Module):
    """Dropout whose draw is given: zero or 1 / (1 - p) for every input."""

    def __init__(self, factor_D: torch.Tensor) -> None:
        super().__init__()
        self.factor_D = factor_D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor_D


@contextmanager
def _by_peft(model: EmotionClassifier, seed: int = 0) -> Iterator[None]:
    """PEFT's own forward, with the inputs dropped that ours drops from that seed."""
    updates, layers = model.backbone.updates, _layers(model)
    assert updates is not None
    torch.manual_seed(seed)
    found: dict[int, torch.Tensor] = {}

    def look(index: int, hidden: torch.Tensor) -> torch.Tensor:
        for group in updates.blocks[index]:
            assert group.update is not None
            for layer, a in zip(group.layers, group.update[0], strict=True):
                dropped = (a == 0).all(0)
                assert torch.equal(dropped, (a == 0).any(0)), "whole inputs"
                found[id(layer)] = torch.where(dropped, 0.0, 1 / (1 - model.experiment.adapter.dropout))
        return hidden

    for index in range(model.backbone.num_layers):
        torch.manual_seed(seed)
        updates.during(look)(index, torch.zeros(1))
    own = {name: layer.lora_dropout["default"] for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_dropout["default"] = _Columns(found[id(layer)])
    model.backbone.updates = None
    yield
    model.backbone.updates = updates
    for name, layer in layers.items():
        layer.lora_dropout["default"] = own[name]


def _far(found: Gradients, expected: Gradients) -> float:
    """The largest difference, in parts of the largest value of its tensor; where that is below a tenth of the largest
    of all, in parts of a tenth of this: those of q and k are small differences."""
    assert found.keys() == expected.keys()
    assert any(".lora_A." in name for name in found)
    largest = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    least = max(largest.values()) / 10
    return max(float((found[name] - expected[name]).abs().max()) / max(largest[name], least) for name in found)


def _check_step(model: EmotionClassifier) -> tuple[torch.Tensor, Gradients]:
    """That of PEFT, which ours has been compared with."""
    with _by_peft(model):
        expected_BK, expected = _step(model)
    found_BK, found = _step(model)
    torch.testing.assert_close(found_BK, expected_BK, rtol=1e-5, atol=1e-5)
    assert _far(found, expected) < 1e-5
    return expected_BK, expected


CASES = [(variant, method) for variant in VARIANTS for method in ("lora", "qlora")]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("variant", "method"), CASES)
def test_a_step_has_the_gradients_of_peft(backbones_dir: Path, variant: str, method: str, dropout: float) -> None:
    """Ranks, alphas and first layers differ from case to case."""
    number = CASES.index((variant, method))
    adapter = {"method": method, "rank": 1 + number % 5, "alpha": 1.0 + number % 4, "dropout": dropout}
    adapter["first_layer"] = number % 2
    exact = _model(backbones_dir, variant, **adapter)
    expected_BK, expected = _check_step(exact)
    for setting, resolution in (("bf16", 2**-8), ("fp16", 2**-11)):
        model = _model(backbones_dir, variant, setting, **adapter)
        with _by_peft(model):
            of_peft_BK, of_peft = _step(model)
        found_BK, found = _step(model)
        error = float((found_BK - expected_BK).abs().max() / expected_BK.abs().max())
        assert error < 1.5 * float((of_peft_BK - expected_BK).abs().max() / expected_BK.abs().max()) + 4 * resolution
        assert _far(found, expected) < 1.5 * _far(of_peft, expected) + 4 * resolution


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_over_nf4_weights_that_are_dequantised_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Rows of whole blocks, as all published backbones have them; those of the other tests are shorter."""
    monkeypatch.setattr(backbone_fixtures, "WIDTH", 64)
    monkeypatch.setattr(backbone_fixtures, "FEED_FORWARD", 128)
    model = _model(backbone_fixtures.write_backbone(variant, tmp_path / variant).parent, variant, method="qlora")
    updates = model.backbone.updates
    assert updates is not None
    assert sorted(len(group.layers) for group in updates.blocks[0]) == [1, 1, 1, 3]
    _check_step(model)


def test_dropout_leaves_the_share_that_it_should_and_changes_with_every_pass(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "whisper", dropout=0.3)
    first, again, second = (_step(model, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    shares = []
    for seed in range(20):
        with _by_peft(model, seed):
            factors = [layer.lora_dropout["default"].factor_D for layer in _layers(model).values()]
        shares.append(float((torch.cat(factors) == 0).float().mean()))
        assert len({tuple(factor.tolist()) for factor in factors}) == len(factors), "every layer has its own draw"
    assert sum(shares) / 20 == pytest.approx(0.3, abs=0.03)
    assert torch.equal(_step(model.eval(), 1)[0], _step(model.eval(), 2)[0])


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("variant", ["wav2vec2-layer", "wavlm-group", "whisper"])
def test_gradient_checkpointing_computes_the_same(backbones_dir: Path, variant: str, method: str) -> None:
    model = _model(backbones_dir, variant, method=method, dropout=0.3)
    expected_BK, expected = _step(model)
    model.backbone.recompute = True
    found_BK, found = _step(model)
    assert torch.equal(found_BK, expected_BK)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "v_proj"], ["v_proj", "fc2"], ["out_proj", "q_proj"]])
def test_any_targets(backbones_dir: Path, targets: list[str]) -> None:
    model = _model(backbones_dir, "whisper", targets=targets, dropout=0.0)
    _check_step(model)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 0, 1, 1), (1,)])
def test_layers_that_are_computed_together_may_be_called_in_any_order_and_with_any_input(
    backbones_dir: Path, order: tuple[int, ...]
) -> None:
    model = _model(backbones_dir, "hubert-group", dropout=0.0)
    attention = model.backbone.layers()[0].attention
    layers = [getattr(attention, name) for name in SAME_INPUT]
    inputs = [torch.randn(2, 5, layers[0].in_features) for _ in range(2)]
    calls = [(number, inputs[turn % 2]) for turn, number in enumerate(order)]
    calls += [(number, inputs[0]) for number in order]
    expected = [layers[number](x) for number, x in calls]  # outside of a forward pass: PEFT's
    updates = model.backbone.updates
    assert updates is not None
    found: list[torch.Tensor] = []

    def run(index: int, hidden: torch.Tensor) -> torch.Tensor:
        found.extend(layers[number](x) for number, x in calls)
        return hidden

    updates.during(run)(0, inputs[0])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


# -- weights: held once, replaced, copied, merged


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_that_are_computed_together_are_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(backbone_fixtures, "WIDTH", 64)
    model = _model(backbone_fixtures.write_backbone("whisper", tmp_path / "whisper").parent, "whisper", method=method)
    attention = model.backbone.layers()[0].self_attn
    weights = [getattr(attention, name).base_layer.weight for name in SAME_INPUT]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def _replaced(model: EmotionClassifier) -> EmotionClassifier:
    layer = model.backbone.layers()[1].self_attn.v_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.data.flip(0), requires_grad=False)
    return model


def _written(model: EmotionClassifier) -> EmotionClassifier:
    state = {name: 1.1 * value for name, value in model.state_dict().items() if ".base_layer.weight" in name}
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("change", [copy.deepcopy, _replaced, _written])
def test_weights_may_be_copied_replaced_and_written(
    backbones_dir: Path, change: Callable[[EmotionClassifier], EmotionClassifier]
) -> None:
    model = change(_model(backbones_dir, "whisper", dropout=0.0))
    _check_step(model)


def test_a_copy_is_its_own_model(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "whisper", dropout=0.0)
    before_BK, _ = _step(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert torch.equal(_step(model)[0], before_BK)
    assert not torch.equal(_step(copied)[0], before_BK)


def test_disabled_and_merged_updates(backbones_dir: Path, tmp_path: Path) -> None:
    model = _model(backbones_dir, "whisper", dropout=0.0)
    frozen = build(experiment(backbones_dir / "whisper", adapter={"method": "frozen"})).eval()
    frozen.head = model.head
    updated_BK, plain_BK = _logits(model), _logits(frozen)
    assert not torch.allclose(updated_BK, plain_BK, atol=1e-2)
    assert model.peft is not None
    with model.peft.disable_adapter():
        torch.testing.assert_close(_logits(model), plain_BK, rtol=1e-4, atol=1e-5)
    model.peft.merge_adapter()
    torch.testing.assert_close(_logits(model), updated_BK, rtol=1e-4, atol=1e-5)
    model.peft.unmerge_adapter()
    torch.testing.assert_close(_logits(model), updated_BK, rtol=1e-4, atol=1e-5)
    model.peft.merge_and_unload()
    assert not _layers(model)
    torch.testing.assert_close(_logits(model), updated_BK, rtol=1e-4, atol=1e-5)
    merged = model.backbone.model.state_dict()
    model.backbone.model.save_pretrained(tmp_path)  # q, k and v are views of one tensor
    read = WhisperEncoder.from_pretrained(tmp_path).state_dict()
    assert merged.keys() == read.keys()
    assert all(torch.equal(merged[name], read[name]) for name in merged)


def test_updates_that_were_merged_into_nf4_and_taken_out_again(backbones_dir: Path) -> None:
    """The weights are others then, as both are rounded."""
    model = _model(backbones_dir, "whisper", method="qlora", dropout=0.0)
    before_BK = _logits(model)
    assert model.peft is not None
    model.peft.merge_adapter()
    merged_BK = _logits(model)
    with _by_peft(model):
        torch.testing.assert_close(merged_BK, _logits(model), rtol=1e-5, atol=1e-5)
    model.peft.unmerge_adapter()
    assert not torch.equal(_logits(model), before_BK)
    _check_step(model)


def _logits(model: EmotionClassifier) -> torch.Tensor:
    with torch.inference_mode():
        return model(BATCH.inputs, BATCH.lengths_B)


# -- PEFT's files


@pytest.mark.parametrize("variant", ["wav2vec2-group", "hubert-noproj"])
def test_an_adapter_that_peft_made_is_loaded(backbones_dir: Path, tmp_path: Path, variant: str) -> None:
    described = _model(backbones_dir, variant, rank=3).peft
    assert described is not None
    targets = sorted(described.peft_config["default"].target_modules)
    settings = LoraConfig(r=3, lora_alpha=16.0, lora_dropout=0.05, target_modules=targets)
    theirs = get_peft_model(AutoModel.from_pretrained(backbones_dir / variant), settings).eval()
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(tmp_path))
    ours = build(experiment(backbones_dir / variant, adapter={"rank": 3}), adapter=tmp_path)
    _check_same_states(ours, theirs)


@pytest.mark.parametrize("variant", ["wav2vec2-group", "hubert-noproj"])
def test_peft_loads_what_was_trained_here(backbones_dir: Path, tmp_path: Path, variant: str) -> None:
    model = _model(backbones_dir, variant, dropout=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):
        _step(model, seed)
        optimizer.step()
    assert model.peft is not None
    model.peft.save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(backbones_dir / variant), str(tmp_path)).eval()
    _check_same_states(model, theirs)


def _check_same_states(ours: EmotionClassifier, theirs: nn.Module) -> None:
    """Of one utterance; transformers' own model needs it standardised, where its backbone does."""
    alone = noise_batch([0.5])
    waveform_BT = alone.inputs
    if ours.backbone.normalize:
        waveform_BT = (waveform_BT - waveform_BT.mean()) / torch.sqrt(waveform_BT.var(correction=0) + 1e-7)
    with torch.inference_mode():
        own = ours.eval().backbone(alone.inputs, alone.lengths_B)[0][-1]
        other = theirs(waveform_BT).last_hidden_state
    torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
