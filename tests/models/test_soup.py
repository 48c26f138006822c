"""The mean of weights: layer by layer the mean of what every checkpoint computes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbone_fixtures import experiment

from ser_ray.models import checkpoint, soup
from ser_ray.models.classifier import EmotionClassifier, build


def _saved(backbones_dir: Path, directory: Path, seed: int, adapter: dict[str, object]) -> Path:
    """A checkpoint whose trained weights are random, each seed's others."""
    model = build(experiment(backbones_dir / "whisper", seed=seed, adapter=adapter))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    checkpoint.save(model, directory / f"seed{seed}", {"epoch": 1})
    return directory / f"seed{seed}"


def _linear_weights(model: EmotionClassifier) -> dict[str, torch.Tensor]:
    """Of every linear layer what it multiplies by in fact, by an identity as its input."""
    found = {}
    for name, module in model.backbone.model.named_modules():
        if name.endswith(("q_proj", "v_proj", "fc1", "fc2")):
            with torch.inference_mode():
                found[name] = module(torch.eye(module.in_features)) - module(torch.zeros(1, module.in_features))
    return found


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "frozen"},
        {"method": "full"},
        {"method": "lora", "rank": 2},
        {"method": "lora", "rank": 2, "variant": "rslora"},
        {"method": "qlora", "rank": 2},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_every_layer_is_the_mean_of_those_of_all(backbones_dir, tmp_path, adapter):
    sources = [_saved(backbones_dir, tmp_path, seed, adapter) for seed in (0, 1, 2)]
    soup.average(sources, tmp_path / "soup")
    models = [checkpoint.load(source).eval() for source in sources]
    mean = checkpoint.load(tmp_path / "soup").eval()
    for name, weight in _linear_weights(mean).items():
        expected = torch.stack([_linear_weights(model)[name] for model in models]).mean(0)
        torch.testing.assert_close(weight, expected, atol=2e-5, rtol=1e-4, msg=name)
    for name, tensor in mean.head.state_dict().items():
        expected = torch.stack([model.head.state_dict()[name] for model in models]).mean(0)
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5, msg=name)
    assert not (tmp_path / "soup" / "training").exists()


def test_the_mean_of_one_is_that_one(backbones_dir, tmp_path):
    source = _saved(backbones_dir, tmp_path, 4, {"method": "lora", "rank": 2})
    soup.average([source], tmp_path / "soup")
    for name in ("head.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (checkpoint.read_tensors(directory / name) for directory in (source, tmp_path / "soup"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_be_averaged_is_said(backbones_dir):
    def described(**adapter: object) -> bool:
        return soup.can_average(experiment(backbones_dir / "whisper", adapter=adapter), 3)

    assert described(method="full")
    assert described(method="lora", rank=170)
    assert not described(method="lora", rank=171)
    assert not described(method="lora", variant="dora")
    assert not described(method="lora", variant="pissa")
