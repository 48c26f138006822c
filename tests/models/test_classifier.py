"""The whole classifier: initial weights, what it returns, and what is masked in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbone_fixtures import LAYERS, experiment, noise_batch

from ser_ray.models.classifier import build


def test_initial_weights_depend_on_the_seed_alone(backbones_dir: Path) -> None:
    def states(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return build(experiment(backbones_dir / "whisper", seed=seed)).state_dict()

    first, same, other = states(1), states(1), states(2)
    assert all(torch.equal(first[key], same[key]) for key in first)
    differing = {key for key in first if not torch.equal(first[key], other[key])}
    assert "head.classifier.1.weight" in differing
    assert any(".lora_A." in key for key in differing)
    assert all(".lora_A." in key or key.startswith("head.") for key in differing)


def test_logits_are_single_precision_and_one_a_class(backbones_dir: Path) -> None:
    model, batch = build(experiment(backbones_dir / "whisper")), noise_batch()
    hiddens, _ = model.backbone(batch.inputs, batch.lengths_B)
    logits_BK = model(batch.inputs, batch.lengths_B)
    assert len(hiddens) == LAYERS + 1
    assert logits_BK.shape == (3, 3)
    assert logits_BK.dtype == torch.float32


@pytest.mark.parametrize("variant", ["whisper", "wav2vec2-group", "wavlm-layer"])
def test_features_are_masked_in_training_only(variant: str, backbones_dir: Path) -> None:
    batch = noise_batch()
    plain = build(experiment(backbones_dir / variant, adapter={"method": "frozen"}, head={"dropout": 0.0}))
    varied = build(
        experiment(
            backbones_dir / variant,
            adapter={"method": "frozen"},
            head={"dropout": 0.0},
            augment={"channel_mask": 0.3, "time_mask": 0.3},
        )
    )
    with torch.inference_mode():
        expected = plain.eval()(batch.inputs, batch.lengths_B)
        assert torch.equal(varied.eval()(batch.inputs, batch.lengths_B), expected)
        assert torch.allclose(plain.train()(batch.inputs, batch.lengths_B), expected)
        assert not torch.allclose(varied.train()(batch.inputs, batch.lengths_B), expected)
