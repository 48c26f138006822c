"""Every family of backbones under every method of adaptation: learn, save, load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbone_fixtures import VARIANTS, experiment, logits, noise_batch
from safetensors.torch import load_file, save_file

from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.training import step
from ser_ray.training.loop import make_optimizer

METHODS = ("frozen", "lora", "qlora", "full")


def _take_steps(model: EmotionClassifier, steps: int = 3) -> list[float]:
    optimizer, batch = make_optimizer(model), noise_batch()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        loss = step.add_gradients(model, batch, torch.ones(3), 1 / len(batch), scaler, model.experiment, last=True)
        step.apply(optimizer, scaler, model.experiment, 1.0)
        losses.append(float(loss))
    return losses


def _tensors(model: EmotionClassifier) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _should_learn(name: str, method: str) -> bool:
    if name.startswith("head."):
        return True
    if method == "full":
        return not name.endswith(("masked_spec_embed", "embed_positions.weight"))
    return ".lora_" in name and method != "frozen"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_change_what_should_learn_and_survive_the_disk(
    backbones_dir: Path, tmp_path: Path, variant: str, method: str
) -> None:
    model = build(experiment(backbones_dir / variant, adapter={"method": method, "rank": 4}, optimizer={"lr": 1e-3}))
    before = _tensors(model)
    losses = _take_steps(model)
    assert torch.isfinite(torch.tensor(losses)).all()
    after = _tensors(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if _should_learn(name, method)}

    checkpoint.save(model, tmp_path, {})
    loaded = checkpoint.load(tmp_path)
    batch = noise_batch([0.4, 0.9], seed=5)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    checkpoint.save(loaded, tmp_path / "again", {})
    assert torch.equal(logits(checkpoint.load(tmp_path / "again"), batch), logits(model, batch))


def test_another_process_gives_the_same_logits(backbones_dir: Path, tmp_path: Path) -> None:
    batch, expected = noise_batch(), {}
    for method in METHODS:
        model = build(experiment(backbones_dir / "wav2vec2-layer", adapter={"method": method}))
        _take_steps(model, 1)
        checkpoint.save(model, tmp_path / method, {})
        expected[method] = logits(model, batch)
    save_file({"waveform": batch.inputs, "lengths": batch.lengths_B}, tmp_path / "batch.safetensors")
    script = """if True:
        import sys, torch
        from safetensors.torch import load_file, save_file
        from ser_ray.models import checkpoint
        torch.set_num_threads(1)
        batch = load_file(sys.argv[1] + "/batch.safetensors")
        with torch.inference_mode():
            save_file({m: checkpoint.load(f"{sys.argv[1]}/{m}")(batch["waveform"], batch["lengths"])
                       for m in sys.argv[2:]}, sys.argv[1] + "/logits.safetensors")
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *METHODS], check=True)
    found = load_file(tmp_path / "logits.safetensors")
    for method in METHODS:
        torch.testing.assert_close(found[method], expected[method], atol=1e-6, rtol=0)
