"""What only a GPU can show: steps that never wait for the host, QLoRA, and a trial held to its share of the memory."""

from __future__ import annotations

import pytest
import torch
from backbone_fixtures import data_of, experiment, tone_batches

from ser_ray.models.classifier import build
from ser_ray.training import loop, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", ["whisper", "wav2vec2-group", "hubert-noproj"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_step_does_not_wait_for_the_host(backbones_dir, variant, method):
    settings = experiment(backbones_dir / variant, adapter={"method": method, "rank": 2})
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


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_tones_are_learned_on_a_gpu(backbones_dir, method):
    settings = experiment(
        backbones_dir / "whisper", adapter={"method": method, "rank": 4}, optimizer={"lr": 3e-3, "head_lr": 1e-2}
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
