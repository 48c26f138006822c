"""Variants of LoRA: where they start, what of them is trained at which rate, and that what is saved fits the published
backbone, here and in PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_fixtures import WIDTH, cached, experiment, logits, noise_batch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from pydantic import ValidationError
from torch import nn

from ser_ray.config import Adapter
from ser_ray.models import backbones, checkpoint
from ser_ray.models.adapters import check_gradients
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.precision import autocast
from ser_ray.schema import UserError
from ser_ray.training.loop import make_optimizer

OF_LORA, OF_QLORA = ("rslora", "dora", "pissa", "loraplus"), ("rslora", "dora", "loftq", "loraplus")
EVERY = [("lora", variant) for variant in OF_LORA] + [("qlora", variant) for variant in OF_QLORA]
RANK, ALPHA = 4, 6.0


def _model(backbones_dir: Path, method: str, variant: str, name: str = "whisper", **adapter: Any) -> EmotionClassifier:
    settings = {"method": method, "variant": variant, "rank": RANK, "alpha": ALPHA, "dropout": 0.3} | adapter
    return build(experiment(backbones_dir / name, adapter=settings))


def _trained(model: EmotionClassifier) -> EmotionClassifier:
    """Every trainable weight elsewhere than it started."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _layers(model: EmotionClassifier) -> dict[str, Any]:
    return {name: module for name, module in model.backbone.model.named_modules() if hasattr(module, "lora_A")}


def _update(layer: Any) -> torch.Tensor:
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def _published(backbones_dir: Path, model: EmotionClassifier) -> dict[str, torch.Tensor]:
    encoder = backbones.load(str(backbones_dir / "whisper")).model
    return {name: encoder.get_submodule(name).weight for name in _layers(model)}


# -- where they start


@pytest.mark.parametrize(("method", "variant"), EVERY)
def test_a_new_one_predicts_what_the_backbone_does(backbones_dir: Path, method: str, variant: str) -> None:
    plain, model = (_model(backbones_dir, method, v) for v in ("plain", variant))
    for (name, weight), other in zip(plain.head.named_parameters(), model.head.parameters(), strict=True):
        assert torch.equal(weight, other), f"{name} depends on the variant"
    if variant != "loftq":
        exact, atol = logits(plain, noise_batch()), 1e-6 if variant == "pissa" else 0.0
        torch.testing.assert_close(logits(model, noise_batch()), exact, atol=atol, rtol=0.0)


def test_loftq_of_full_rank_makes_up_for_nf4(backbones_dir: Path) -> None:
    batch = noise_batch()
    exact, nf4, loftq = (
        logits(_model(backbones_dir, method, variant, rank=WIDTH), batch)
        for method, variant in (("lora", "plain"), ("qlora", "plain"), ("qlora", "loftq"))
    )
    assert (nf4 - exact).abs().max() > 1e-3
    torch.testing.assert_close(loftq, exact, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_loftq_is_the_best_update_for_the_error_of_nf4(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "qlora", "loftq")
    for name, weight in _published(backbones_dir, model).items():
        layer = _layers(model)[name]
        inputs = torch.eye(layer.in_features)
        own = layer.get_base_layer()
        error = weight - (own(inputs) - (0 if own.bias is None else own.bias)).T  # from what the 4-bit layer answers
        smallest = torch.linalg.svdvals(error)[RANK:].square().sum().sqrt()
        left = float((error - _update(layer)).norm())
        assert left == pytest.approx(float(smallest), rel=1e-2)
        assert left < 0.95 * float(error.norm())


@torch.no_grad()
def test_pissa_starts_as_in_peft(backbones_dir: Path) -> None:
    model = _model(backbones_dir, "lora", "pissa")
    theirs = backbones.load(str(backbones_dir / "whisper")).model
    get_peft_model(
        theirs, LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="pissa", target_modules=[*_layers(model)])
    )
    for name, layer in _layers(model).items():
        other = theirs.get_submodule(name)
        left, theirs_left = layer.get_base_layer().weight, other.get_base_layer().weight
        torch.testing.assert_close(left + _update(layer), theirs_left + _update(other), atol=1e-6, rtol=0)
        assert float(left.norm()) == pytest.approx(float(theirs_left.norm()), rel=1e-2)
        for part in ("lora_A", "lora_B"):  # their rows and columns may have other signs
            own, its = (getattr(one, part)["default"].weight.norm() for one in (layer, other))
            assert float(own) == pytest.approx(float(its), rel=1e-2)
        assert isinstance(layer.lora_dropout["default"], nn.Identity), "it would drop a part of the backbone"


@pytest.mark.parametrize(("method", "variant"), [("lora", "pissa"), ("qlora", "loftq")])
def test_the_same_seed_gives_the_same_start(backbones_dir: Path, method: str, variant: str) -> None:
    one, other = (_model(backbones_dir, method, variant) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["plain", *OF_LORA])
def test_the_scale_is_that_of_the_papers(backbones_dir: Path, variant: str) -> None:
    scales = {layer.scaling["default"] for layer in _layers(_model(backbones_dir, "lora", variant)).values()}
    assert scales == {ALPHA / math.sqrt(RANK) if variant == "rslora" else ALPHA / RANK}


def test_layers_below_the_first_are_as_published(backbones_dir: Path) -> None:
    """What is cached of them is the same for every variant."""
    batch = noise_batch()
    models = [_trained(_model(backbones_dir, "lora", variant, first_layer=1)) for variant in ("plain", "pissa")]
    features = [cached(model, batch) for model in models]
    assert torch.equal(features[0].inputs, features[1].inputs)
    pissa, answer = models[1], logits(models[1], features[1])
    pissa.prefix = None
    torch.testing.assert_close(answer, logits(pissa, batch), atol=5e-3, rtol=0)  # fp16 in the cache


# -- what is trained


@pytest.mark.parametrize(("method", "variant"), EVERY)
@pytest.mark.parametrize("name", ["whisper", "hubert-group", "wavlm-layer"])
def test_every_weight_gets_a_gradient(backbones_dir: Path, method: str, variant: str, name: str) -> None:
    model, batch = _trained(_model(backbones_dir, method, variant, name)).train(), noise_batch()
    nn.functional.cross_entropy(model(batch.inputs, batch.lengths_B), batch.labels_B).backward()
    check_gradients(model)
    learning = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert all(".lora_" in n and p.grad is not None and bool(p.grad.any()) for n, p in learning.items())
    assert any(".lora_magnitude_vector." in n for n in learning) == (variant == "dora")


@pytest.mark.parametrize("variant", ["plain", *OF_LORA])
def test_rates_are_those_of_lora_plus_there_and_one_elsewhere(backbones_dir: Path, variant: str) -> None:
    model = _model(backbones_dir, "lora", variant, loraplus_ratio=5.0)
    assert model.peft is not None
    own = {id(p): group["base_lr"] for group in make_optimizer(model).param_groups for p in group["params"]}
    trainable = [p for p in model.backbone.parameters() if p.requires_grad]
    settings = model.experiment.optimizer
    theirs = create_loraplus_optimizer(model.peft, torch.optim.AdamW, lr=settings.lr, loraplus_lr_ratio=5.0)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    if variant == "loraplus":
        assert {id(p): own[id(p)] for p in trainable} == expected
        assert len(set(expected.values())) == 2
    else:
        assert {own[id(p)] for p in trainable} == {settings.lr}
    assert {own[id(p)] for p in model.head.parameters() if p.requires_grad} == {settings.head_lr}
    assert own.keys() == {id(p) for p in model.parameters() if p.requires_grad}


# -- what is saved


@pytest.mark.parametrize(("method", "variant"), EVERY)
def test_a_checkpoint_is_the_model_to_the_bit(backbones_dir: Path, tmp_path: Path, method: str, variant: str) -> None:
    model, batch = _trained(_model(backbones_dir, method, variant)), noise_batch()
    checkpoint.save(model, tmp_path, {})
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    checkpoint.save(loaded, tmp_path / "again", {})
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / adapter).read_bytes() == (tmp_path / adapter).read_bytes()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_and_so_it_is_in_bf16(backbones_dir: Path, tmp_path: Path, method: str) -> None:
    """Whatever frozen weights are rounded to, and when."""
    settings = {"method": method, "variant": "pissa" if method == "lora" else "loftq", "rank": RANK}
    described = experiment(backbones_dir / "whisper", adapter=settings, precision="bf16")
    model, batch = _trained(build(described)), noise_batch()
    checkpoint.save(model, tmp_path, {})
    loaded, resumed = checkpoint.load(tmp_path), build(described)
    checkpoint.load_weights(resumed, tmp_path)
    with autocast("bf16", "cpu"):
        expected, *found = (logits(one, batch) for one in (model, loaded, resumed))
    assert all(torch.equal(own, expected) for own in found)


@pytest.mark.parametrize(("method", "variant"), EVERY)
def test_peft_loads_it_onto_the_published_backbone(
    backbones_dir: Path, tmp_path: Path, method: str, variant: str
) -> None:
    model, batch = _trained(_model(backbones_dir, method, variant)), noise_batch()
    checkpoint.save(model, tmp_path, {})
    published = backbones.load(str(backbones_dir / "whisper"), quantize=method == "qlora")
    theirs = PeftModel.from_pretrained(published.model, str(tmp_path / "adapter")).eval()
    with torch.inference_mode():
        own = model.eval().backbone(batch.inputs, batch.lengths_B)[0][-1]
        torch.testing.assert_close(published(batch.inputs, batch.lengths_B)[0][-1], own, atol=1e-5, rtol=1e-5)
        if method == "lora":
            published.model = theirs.merge_and_unload()
            torch.testing.assert_close(published(batch.inputs, batch.lengths_B)[0][-1], own, atol=1e-5, rtol=1e-5)


def test_pissa_is_saved_as_ordinary_lora_of_twice_the_rank(backbones_dir: Path, tmp_path: Path) -> None:
    model = _model(backbones_dir, "lora", "pissa")
    checkpoint.save(model, tmp_path, {})
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["init_lora_weights"]) == (2 * RANK, 2 * ALPHA, True)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told | {"r": RANK, "lora_alpha": ALPHA}))
    with pytest.raises(UserError, match=r"adapter_config\.json: r is 4, but experiment\.yaml describes 8"):
        checkpoint.load(tmp_path)


def test_pissa_resumes_where_the_decomposition_came_out_otherwise(backbones_dir: Path, tmp_path: Path) -> None:
    """On another machine: its own initial update, and so its frozen weights, are not those of the checkpoint."""
    model = _trained(_model(backbones_dir, "lora", "pissa"))
    checkpoint.save(model, tmp_path, {})
    elsewhere = _model(backbones_dir, "lora", "pissa")
    with torch.no_grad():
        for layer in _layers(elsewhere).values():
            layer.get_base_layer().weight.add_(0.01)
            layer.initial_A.mul_(1.01)
    checkpoint.load_weights(elsewhere, tmp_path)
    for (name, expected), found in zip(model.state_dict().items(), elsewhere.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    checkpoint.save(elsewhere, tmp_path / "again", {})
    assert torch.equal(logits(checkpoint.load(tmp_path / "again"), noise_batch()), logits(model, noise_batch()))


# -- mistakes


@pytest.mark.parametrize(
    ("method", "variant", "said"),
    [
        ("lora", "loftq", "loftq makes up for the error of 4-bit weights: set adapter.method to qlora"),
        ("qlora", "pissa", "set adapter.method to lora, or adapter.variant to loftq"),
        ("lora", "dorra", "Input should be"),
    ],
)
def test_what_does_not_go_together_is_said(method: str, variant: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        Adapter.model_validate({"method": method, "variant": variant})
    assert [error["loc"] for error in caught.value.errors()] == [("variant",)]


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "loftq", "loraplus"])
@pytest.mark.parametrize("method", ["frozen", "full"])
def test_without_lora_a_variant_means_nothing(backbones_dir: Path, method: str, variant: str) -> None:
    """As rank: both can be searched at once."""
    plain, model = (_model(backbones_dir, method, v) for v in ("plain", variant))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    rates, own = ([(g["lr"], len(g["params"])) for g in make_optimizer(m).param_groups] for m in (plain, model))
    assert rates == own


@pytest.mark.parametrize(("method", "variant"), [("lora", "pissa"), ("qlora", "loftq")])
def test_a_rank_above_that_of_a_layer_is_refused(backbones_dir: Path, method: str, variant: str) -> None:
    with pytest.raises(UserError, match=rf"adapter\.rank is {WIDTH + 1}, but \S+ has only {WIDTH} singular") as caught:
        _model(backbones_dir, method, variant, rank=WIDTH + 1)
    assert "\n" not in str(caught.value)
    _model(backbones_dir, method, "plain", rank=WIDTH + 1)
