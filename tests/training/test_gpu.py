"""What only a GPU can show: steps that never wait for the host, QLoRA, compiled blocks, a trial held to its share of
the memory, and the memory of a step."""

from __future__ import annotations

import pytest
import torch
from backbone_fixtures import data_of, experiment, tone_batches

from ser_ray.models.classifier import build
from ser_ray.training import loop, step
from ser_ray.training.step_memory import step_bytes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", ["whisper", "wav2vec2-group", "hubert-noproj", "wavlm-layer"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_step_does_not_wait_for_the_host(backbones_dir, variant, method):
    masks = {"channel_mask": 0.3, "time_mask": 0.3}
    settings = experiment(backbones_dir / variant, adapter={"method": method, "rank": 2}, augment=masks)
    model = build(settings, "cuda")
    optimizer, weights_K = loop.make_optimizer(model), torch.tensor([9.0, 1.0, 3.0], device="cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    model.train()
    for number, batch in enumerate(tone_batches(24, 3)):
        batch = batch.pin().to("cuda")
        torch.cuda.synchronize()
        if number > 0:  # the first step compiles and chooses kernels
            torch.cuda.set_sync_debug_mode("error")
        loss = step.add_gradients(model, batch, weights_K, 1 / 20, scaler, settings, last=True)
        step.apply(optimizer, scaler, settings, 1.0)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(loss)


@pytest.mark.parametrize(("method", "compiles"), [("lora", False), ("lora", True), ("qlora", False), ("full", False)])
def test_tones_are_learned_on_a_gpu(backbones_dir, method, compiles):
    settings = experiment(
        backbones_dir / "whisper",
        adapter={"method": method, "rank": 4},
        optimizer={"lr": 3e-3, "head_lr": 1e-2},
        compile=compiles,
    )
    train, dev = tone_batches(60, 3), tone_batches(30, 3, seed=1)
    data = data_of(lambda epoch: train, dev)
    records: list[loop.Record] = []
    loop.fit(build(settings, "cuda"), data, lambda record, save: records.append(record))
    assert records[-1]["best_dev_uar"] > 0.8
    assert records[-1]["peak_memory_mb"] > 0


def test_more_than_the_share_of_memory_is_refused():
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(torch.cuda.get_device_properties(0).total_memory * 0.05), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_memory_of_a_step_grows_with_its_batches(backbones_dir):
    """And is at least that of its waveforms."""
    found = []
    for seconds in (60, 600):
        settings = experiment(backbones_dir / "whisper", adapter={"method": "full"}, batch_seconds=seconds)
        found.append(step_bytes(settings, torch.device("cuda")))
        assert found[-1] > 4 * 16_000 * seconds
    assert found[1] > found[0]
