"""What makes a block faster and leaves its output as it is: no mask where none is needed, and compiled blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_fixtures import VARIANTS, experiment, logits, noise_batch
from torch.overrides import TorchFunctionMode

from ser_ray.config import Experiment
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.speech.stream import Batch
from ser_ray.training import step

EVEN = replace(noise_batch((0.5, 0.5, 0.5)), padded=False)


class Masks(TorchFunctionMode):
    """The masks that attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor | None] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.found.append((kwargs or {}).get("attn_mask"))
        return function(*args, **(kwargs or {}))


def still(settings: Experiment) -> EmotionClassifier:
    """Without dropout, that of attention and of the backbone's own configuration too."""
    model = build(settings)
    for module in model.modules():
        for name in ("p", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def trained(model: EmotionClassifier, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step, and its gradients."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = step.add_gradients(model.train(), batch, torch.ones(3), 1.0, scaler, model.experiment, True)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-4)
    assert one[1].keys() == other[1].keys() != set()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_lengths_need_no_mask(backbones_dir: Path, variant: str) -> None:
    settings = experiment(backbones_dir / variant, adapter={"method": "full"})
    with Masks() as without:
        found = trained(still(settings), EVEN)
    with Masks() as masked:
        expected = trained(still(settings), replace(EVEN, padded=True))
    assert_same(found, expected)
    if not variant.startswith("wavlm"):  # whose positions are a mask of attention too
        assert len(without.found) == len(masked.found) > 0
        assert all(mask is None for mask in without.found)
        assert all(mask is not None for mask in masked.found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "method"),
    [("whisper", "lora"), ("whisper", "qlora"), ("wav2vec2-layer", "lora"), ("hubert-group", "full")],
)
def test_compiled_blocks_are_the_blocks(backbones_dir: Path, variant: str, method: str) -> None:
    """Batches of other sizes and lengths, with gradients and without, padded and not; traced, without the compiler."""
    settings = experiment(backbones_dir / variant, adapter={"method": method, "rank": 2})
    plain, compiled = still(settings), still(settings)
    compiled.backbone.compile_blocks("aot_eager")
    for batch in (noise_batch(), EVEN, noise_batch((0.9, 0.3), seed=1), noise_batch((0.4,), seed=2)):
        assert_same(trained(compiled, batch), trained(plain, batch))
        torch.testing.assert_close(logits(compiled, batch), logits(plain, batch), atol=1e-5, rtol=1e-4)


def test_a_compiled_block_is_the_block(backbones_dir: Path) -> None:
    """The same in short: one batch, the backward pass, one block."""
    settings = experiment(backbones_dir / "whisper", adapter={"method": "full", "first_layer": 1})
    plain, compiled = still(settings), still(settings)
    compiled.backbone.compile_blocks("aot_eager")
    assert_same(trained(compiled, noise_batch()), trained(plain, noise_batch()))


def test_blocks_are_compiled_where_the_experiment_says_so(backbones_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ser_ray.models.backbones.Backbone.compile_blocks", lambda self: asked.append(self))
    for compiles in (False, True):
        model = build(experiment(backbones_dir / "whisper", compile=compiles))
        assert step.distribute(model) is model
        assert asked == [model.backbone] * compiles
