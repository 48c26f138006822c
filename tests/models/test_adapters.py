"""Which weights learn, that they do, and that mistakes are named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from backbone_fixtures import FEED_FORWARD, LAYERS, VARIANTS, WIDTH, experiment, noise_batch
from torch import nn

from ser_ray.config import Adapter
from ser_ray.models import backbones
from ser_ray.models.adapters import adapt, check_gradients
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError


def _model(backbones_dir: Path, variant: str, **adapter: object) -> EmotionClassifier:
    return build(experiment(backbones_dir / variant, adapter=adapter))


def _backward(model: EmotionClassifier) -> None:
    batch = noise_batch()
    model.train()
    nn.functional.cross_entropy(model(batch.inputs, batch.lengths_B), batch.labels_B).backward()


def _learning(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


# -- what learns


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_adds_rank_times_inputs_plus_outputs(backbones_dir: Path, variant: str, rank: int) -> None:
    model = _model(backbones_dir, variant, method="lora", rank=rank)
    attention = 4 * rank * (WIDTH + WIDTH)
    feed_forward = 2 * rank * (WIDTH + FEED_FORWARD)
    learning = _learning(model.backbone)
    assert sum(learning.values()) == LAYERS * (attention + feed_forward)
    assert all(".lora_" in name for name in learning)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_changes_nothing(backbones_dir: Path, variant: str) -> None:
    batch = noise_batch()
    frozen, lora = (_model(backbones_dir, variant, method=method).eval() for method in ("frozen", "lora"))
    with torch.inference_mode():
        for own, other in zip(
            lora.backbone(batch.inputs, batch.lengths_B)[0],
            frozen.backbone(batch.inputs, batch.lengths_B)[0],
            strict=True,
        ):
            assert torch.equal(own, other)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("variant", ["wav2vec2-layer", "wavlm-group", "whisper"])
def test_layers_below_the_first_stay_frozen_and_quiet(backbones_dir: Path, variant: str, method: str) -> None:
    model = _model(backbones_dir, variant, method=method, first_layer=1, targets=None)
    low, high = model.backbone.layers()
    assert not _learning(low)
    assert _learning(high)
    assert len(_learning(model.backbone)) == len(_learning(high)), "nothing outside of the blocks learns"
    model.train()
    assert not any(module.training for module in low.modules())
    assert all(module.training for module in high.modules())
    assert model.head.training
    _backward(model)
    check_gradients(model)


def test_a_frozen_backbone_stays_in_evaluation_mode(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "hubert-group", method="frozen").train()
    assert not _learning(model.backbone)
    assert not any(module.training for module in model.backbone.modules())
    assert model.head.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_trains_every_weight_but_the_given_positions(backbones_dir: Path, variant: str) -> None:
    model = _model(backbones_dir, variant, method="full")
    frozen = {name for name, p in model.backbone.model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_positions.weight" if variant == "whisper" else "masked_spec_embed"}
    _backward(model)
    check_gradients(model)


def test_dropout_is_in_the_learning_part_only(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "whisper", method="lora", dropout=0.5, first_layer=1).train()
    batch = noise_batch()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.ones_(parameter)
    first, second = (model.backbone(batch.inputs, batch.lengths_B)[0] for _ in range(2))
    assert torch.equal(first[1], second[1]), "below the first adapted layer nothing is random"
    assert not torch.equal(first[2], second[2])


# -- quantised


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_qlora_computes_in_the_precision_of_the_experiment(
    backbones_dir: Path, precision: str, dtype: torch.dtype
) -> None:
    """On a CPU too."""
    model = build(experiment(backbones_dir / "whisper", adapter={"method": "qlora"}, precision=precision))
    quantised = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {module.compute_dtype for module in quantised} == {dtype}


@pytest.mark.parametrize("variant", VARIANTS)
def test_qlora_holds_blocks_in_nested_nf4(backbones_dir: Path, variant: str) -> None:
    model = _model(backbones_dir, variant, method="qlora")
    quantised = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(quantised) == LAYERS * 6
    for name, module in quantised.items():
        assert "layers." in name
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested, name
        assert module.weight.dtype == torch.uint8
    for part in (model.head, getattr(model.backbone.model, "feature_projection", nn.Identity())):
        assert not any(isinstance(module, bnb.nn.Linear4bit) for module in part.modules())


@pytest.mark.parametrize("variant", ["wav2vec2-layer", "whisper"])
def test_qlora_has_the_same_gradients_after_an_evaluation(backbones_dir: Path, variant: str) -> None:
    """4-bit layers that repack themselves for inference would cut the gradient from the second epoch on."""
    model, batch = _model(backbones_dir, variant, method="qlora", dropout=0.0), noise_batch()
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        _backward(model)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.eval()
        with torch.inference_mode():
            model(batch.inputs, batch.lengths_B)
    first, second = gradients
    assert any(".lora_B." in name and torch.any(gradient) for name, gradient in first.items())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- mistakes


def test_a_bypassed_adapter_is_named_after_the_first_step(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "wavlm-group", method="lora", targets=["q_proj"])
    for layer in model.backbone.layers():
        projection = layer.attention.q_proj
        projection.forward = projection.base_layer.forward  # as where an encoder takes the weights for itself
    _backward(model)
    with pytest.raises(UserError, match=r"encoder\.layers\.0\.attention\.q_proj.*adapter\.targets") as caught:
        check_gradients(model)
    assert "\n" not in str(caught.value)


def test_a_weight_that_the_head_does_not_use_is_named(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "whisper", method="lora")
    model.head.register_module("spare", nn.Linear(2, 2))
    _backward(model)
    with pytest.raises(UserError, match=r"^head\.spare got no gradient in the first step: the head or its pooling"):
        check_gradients(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_targets_all_learn(backbones_dir: Path, variant: str) -> None:
    model = _model(backbones_dir, variant, method="lora")
    _backward(model)
    check_gradients(model)


@pytest.mark.parametrize("targets", [("query",), ("q_proj", "query")])
def test_targets_that_do_not_exist(backbones_dir: Path, targets: tuple[str, ...]) -> None:
    backbone = backbones.load(str(backbones_dir / "whisper"))
    with pytest.raises(UserError, match=r"adapter\.targets: 'query'.*known: fc1, fc2, k_proj") as caught:
        adapt(backbone, Adapter(targets=targets))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_first_layer_that_does_not_exist(backbones_dir: Path, method: str) -> None:
    backbone = backbones.load(str(backbones_dir / "whisper"))
    with pytest.raises(UserError, match=rf"adapter\.first_layer is {LAYERS}.*0 to {LAYERS - 1}"):
        adapt(backbone, Adapter(method=method, first_layer=LAYERS))


def test_the_saved_adapter_speaks_peft(backbones_dir: Path, tmp_path: Path) -> None:
    """Another program that knows PEFT alone loads the updates onto transformers' own model."""
    from peft import PeftModel
    from transformers import AutoModel

    model = _model(backbones_dir, "hubert-group", method="lora")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.constant_(parameter, 0.1)
    assert model.peft is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.peft.save_pretrained(str(tmp_path))
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(backbones_dir / "hubert-group"), str(tmp_path)).eval()
    batch = noise_batch([0.5])
    with torch.inference_mode():
        own = model.eval().backbone(batch.inputs, batch.lengths_B)[0][-1]
        other = theirs(batch.inputs).last_hidden_state
    torch.testing.assert_close(own, other, atol=2e-5, rtol=1e-5)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(backbones_dir / "hubert-group")
