"""Checkpoints: nothing but safetensors, JSON and YAML; whole ones only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from backbone_fixtures import experiment, logits, noise_batch
from safetensors.torch import save_file

from ser_ray.models import checkpoint
from ser_ray.models.classifier import build
from ser_ray.schema import UserError
from ser_ray.training.inference import embed, predict
from ser_ray.training.loop import make_optimizer

PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""Protocols of pickle, and the archive that torch.save makes."""


@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
def test_no_file_is_a_pickle(backbones_dir: Path, tmp_path: Path, method: str) -> None:
    model = build(experiment(backbones_dir / "whisper", adapter={"method": method}))
    optimizer, batch = make_optimizer(model), noise_batch()
    model(batch.inputs, batch.lengths_B).sum().backward()
    optimizer.step()
    checkpoint.save_training_state(tmp_path, optimizer, {"epoch": 1})
    checkpoint.save(model, tmp_path, {"dev_uar": 0.5})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".md"}
    assert not [path for path in files if path.read_bytes()[:4].startswith(PICKLE_STARTS)]
    assert json.loads((tmp_path / "labels.json").read_text()) == {"0": "angry", "1": "happy", "2": "sad"}


def test_torch_save_would_be_recognised(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "state")
    assert (tmp_path / "state").read_bytes()[:4].startswith(PICKLE_STARTS)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("frozen", "experiment.yaml"),
        ("frozen", "head.safetensors"),
        ("frozen", "metrics.json"),
        ("lora", "adapter/adapter_model.safetensors"),
        ("full", "backbone/model.safetensors"),
    ],
)
def test_a_part_that_is_missing_is_named(backbones_dir: Path, tmp_path: Path, method: str, name: str) -> None:
    checkpoint.save(build(experiment(backbones_dir / "whisper", adapter={"method": method})), tmp_path, {})
    (tmp_path / name).unlink()
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_has_moved_is_named(backbones_dir: Path, tmp_path: Path) -> None:
    away = (backbones_dir / "whisper").rename(backbones_dir / "moved")
    try:
        model = build(experiment(away))
        checkpoint.save(model, tmp_path, {})
    finally:
        away.rename(backbones_dir / "whisper")
    with pytest.raises(UserError, match="moved: no such directory"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("head", [{"hidden": 8, "pooling": "attentive"}, {"layer_mix": "last", "pooling": "mean"}])
def test_every_part_of_the_head_comes_back(backbones_dir: Path, tmp_path: Path, head: dict[str, object]) -> None:
    model, batch = build(experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head=head)), noise_batch()
    with torch.no_grad():
        for tensor in model.head.state_dict().values():
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)))
    checkpoint.save(model, tmp_path, {})
    assert torch.equal(logits(checkpoint.load(tmp_path), batch), logits(model, batch))


def test_a_loaded_checkpoint_is_in_evaluation_mode(backbones_dir: Path, tmp_path: Path) -> None:
    checkpoint.save(build(experiment(backbones_dir / "whisper")), tmp_path, {})
    assert not any(module.training for module in checkpoint.load(tmp_path).modules())


@pytest.mark.parametrize("backbone", ["whisper", "wav2vec2-layer", "wavlm-group"])
@pytest.mark.parametrize("method", ["lora", "frozen"])
def test_blocks_without_a_weight_are_not_run(backbones_dir: Path, tmp_path: Path, backbone: str, method: str) -> None:
    """As of a probe of one layer; what is answered is the same."""
    head = {"layer_mix": "weighted", "pooling": "statistics"}
    model = build(experiment(backbones_dir / backbone, adapter={"method": method}, head=head)).eval()
    batch = noise_batch()
    for layer in range(model.backbone.num_layers + 1):
        with torch.no_grad():
            model.head.mix_L.zero_()[layer] = 1.0
            model.head.mix_L[0] += 0.25
        checkpoint.save(model, tmp_path / str(layer), {})
        loaded, run = checkpoint.load(tmp_path / str(layer)), mock.Mock(return_value=None)
        for block in loaded.backbone.layers():
            block.register_forward_hook(run)
        found_BK = loaded(batch.inputs, batch.lengths_B)
        assert run.call_count == layer
        assert torch.equal(loaded.pooled(batch.inputs, batch.lengths_B), model.pooled(batch.inputs, batch.lengths_B))
        assert torch.equal(found_BK, model(batch.inputs, batch.lengths_B))


@pytest.mark.parametrize("head", [{"layer_mix": "last"}, {"layer_mix": "concat"}, {"layer_mix": "weighted"}])
def test_all_blocks_are_run_where_all_have_a_weight(backbones_dir: Path, tmp_path: Path, head: dict[str, str]) -> None:
    model = build(experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head=head))
    checkpoint.save(model, tmp_path, {})
    assert checkpoint.load(tmp_path).stop in (None, model.backbone.num_layers)


def test_an_optimizer_without_steps_can_be_resumed(backbones_dir: Path, tmp_path: Path) -> None:
    """As at epoch 0, where the probe is reported before any step."""
    optimizer = make_optimizer(build(experiment(backbones_dir / "whisper")))
    checkpoint.save_training_state(tmp_path, optimizer, {"epoch": 0})
    assert checkpoint.load_training_state(tmp_path, optimizer) == {"epoch": 0}
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_who_may_read_one_file_may_read_all(backbones_dir: Path, tmp_path: Path, method: str) -> None:
    """safetensors would make its files readable by their owner alone: no checkpoint for a colleague."""
    model = build(experiment(backbones_dir / "whisper", adapter={"method": method}))
    checkpoint.save(model, tmp_path / "best", {"epoch": 0})
    files = [path for path in (tmp_path / "best").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert len({path.stat().st_mode & 0o777 for path in files}) == 1


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("optimizer.safetensors", b"", "not readable as safetensors"),
        ("optimizer.safetensors", None, "is missing"),
        ("state.json", b"[1", "not readable as JSON"),
        ("state.json", b"[]", "no object"),
        ("state.json", None, "is missing"),
    ],
)
def test_a_damaged_state_of_a_training_is_one_line(
    backbones_dir: Path, tmp_path: Path, name: str, changed: bytes | None, said: str
) -> None:
    optimizer = make_optimizer(build(experiment(backbones_dir / "whisper")))
    checkpoint.save_training_state(tmp_path, optimizer, {"epoch": 0})
    path = tmp_path / "training" / name
    path.unlink() if changed is None else path.write_bytes(changed)
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load_training_state(tmp_path, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"0.exp_avg": torch.full((3,), math.nan)}, "not finite"),
        ({"0.exp_avg": torch.ones(2)}, "other parameters"),
        ({"7.exp_avg": torch.ones(3)}, "other parameters"),
        ({"x": torch.ones(3)}, "other parameters"),
        ({"0.exp_avg": torch.ones(3), "1.exp_avg_sq": torch.ones(3)}, "other parameters"),
    ],
)
def test_moments_of_another_training_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3)) for _ in range(2)])
    checkpoint.save_training_state(tmp_path, optimizer, {"epoch": 0})
    save_file(tensors, tmp_path / "training" / "optimizer.safetensors")
    with pytest.raises(UserError, match=said):
        checkpoint.load_training_state(tmp_path, optimizer)


def _calibrated(backbones_dir: Path, directory: Path, content: object) -> Path:
    checkpoint.save(build(experiment(backbones_dir / "whisper")), directory, {})
    (directory / "calibration.json").write_text(json.dumps(content))
    return directory


def test_answers_are_calibrated(backbones_dir: Path, tmp_path: Path) -> None:
    """By the temperature of the file, everywhere that probabilities are made; without the file by none."""
    saved = _calibrated(backbones_dir, tmp_path, {"temperature": 0.25, "least_probability": 0.2, "coverage": 0.9})
    model, tone = checkpoint.load(saved), 0.3 * torch.sin(torch.arange(8000) / 8).numpy()
    assert (model.temperature, model.least_probability) == (0.25, 0.2)
    found = list(next(iter(predict(model, [(tone, 16_000)]))).probabilities.values())
    pooled_1P = torch.from_numpy(embed(model, [(tone, 16_000)]))
    with torch.inference_mode():
        logits_K = model.head.classify(pooled_1P)[0].double()
    assert found == pytest.approx((4 * logits_K).softmax(-1).tolist(), abs=1e-5)
    (saved / "calibration.json").unlink()
    plain = checkpoint.load(saved)
    assert (plain.temperature, plain.least_probability) == (1.0, None)
    answer = next(iter(predict(plain, [(tone, 16_000)])))
    assert list(answer.probabilities.values()) == pytest.approx(logits_K.softmax(-1).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "temperature"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 1.0, "least_probability": 1.5}, "least_probability"),
        ({"temperature": 1.0, "least_probability": "low"}, "least_probability"),
        ([1.0], "no object"),
    ],
)
def test_a_calibration_that_is_none_is_one_line(
    backbones_dir: Path, tmp_path: Path, content: object, said: str
) -> None:
    saved = _calibrated(backbones_dir, tmp_path, content)
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load(saved)
    assert "calibration.json" in str(caught.value)
    assert "\n" not in str(caught.value)
