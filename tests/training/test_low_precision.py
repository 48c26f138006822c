"""Training in bf16 and fp16 on a CPU: every adapter learns what it learns in fp32, from waveforms and from a cache."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_fixtures import cached, data_of, experiment, tone_batches, with_sections
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.speech.stream import Batch
from ser_ray.training import loop
from ser_ray.training.probe import start_from_probe

TRAIN, DEV = tone_batches(18, 3, seed=1, noisiness=0.5), tone_batches(12, 3, seed=2, noisiness=0.5)
LOW = ("bf16", "fp16")
LOSS = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 4e-3}
"""How far a loss may be from that in fp32, in parts of it."""


def _described(backbones_dir: Path, method: str = "lora", **sections: Any) -> Experiment:
    """Without dropout, whose draws differ from a cache's."""
    head = {"dropout": 0.0} | sections.pop("head", {})
    adapter = {"method": method, "first_layer": 1, "rank": 4, "dropout": 0.0}
    rates = {"lr": 3e-3, "head_lr": 3e-2}
    return experiment(backbones_dir / "whisper", adapter=adapter, head=head, optimizer=rates, epochs=2, **sections)


def _cached(model: EmotionClassifier, batches: list[Batch]) -> list[Batch]:
    return [cached(model, batch, model.experiment.precision) for batch in batches]


def _fit(
    described: Experiment, of_cache: bool = False, keep: Path | None = None, resume_from: Path | None = None
) -> tuple[EmotionClassifier, list[dict[str, Any]]]:
    model, records = build(described), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.backbone.model.dropout = 0.0
    every = _cached(model, [*TRAIN, *DEV]) if of_cache else [*TRAIN, *DEV]
    train, dev = every[: len(TRAIN)], every[len(TRAIN) :]

    def on_epoch(record: loop.Record, save: loop.Save) -> None:
        records.append(dict(record))
        if keep is not None:
            save(keep / str(record["epoch"]))

    loop.fit(model, data_of(lambda epoch: train, dev), on_epoch, resume_from=resume_from)
    return model, records


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
@pytest.mark.parametrize("method", ["frozen", "lora", "qlora", "full"])
def test_losses_are_those_of_fp32(backbones_dir: Path, method: str, pooling: str) -> None:
    described = _described(backbones_dir, method, head={"pooling": pooling})
    _, exact = _fit(described)
    for setting, tolerance in LOSS.items():
        for of_cache in (False, True):
            _, records = _fit(with_sections(described, precision=setting), of_cache)
            for record, expected in zip(records, exact, strict=True):
                for loss in ("train_loss", "dev_loss"):
                    assert record[loss] == pytest.approx(expected[loss], rel=tolerance), (setting, of_cache, record)


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
@pytest.mark.parametrize("mix", ["weighted", "concat"])
@pytest.mark.parametrize("setting", LOW)
def test_the_head_starts_as_the_probe_of_what_it_will_be_given(
    backbones_dir: Path, setting: str, mix: str, pooling: str
) -> None:
    """Of a cache and of waveforms alike."""
    head = {"pooling": pooling, "layer_mix": mix, "init": "probe"}
    described = _described(backbones_dir, "frozen", head=head, precision=setting)
    found = []
    for of_cache in (False, True):
        model = build(described)
        every = _cached(model, [*TRAIN, *DEV]) if of_cache else [*TRAIN, *DEV]
        start_from_probe(model, every[: len(TRAIN)], every[len(TRAIN) :], lambda value: [value])
        found.append(torch.cat([logits_BK for _, logits_BK in loop.predict_batches(model, every)]))
    assert float(found[0].std()) > 0.3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("setting", LOW)
def test_the_loss_is_computed_in_fp32(backbones_dir: Path, setting: str) -> None:
    model, records = _fit(_described(backbones_dir, precision=setting))
    logits_BK = torch.cat([logits_BK for _, logits_BK in loop.predict_batches(model, DEV)])
    assert logits_BK.dtype == torch.float32
    labels_B = torch.cat([batch.labels_B for batch in DEV])
    expected = float(nn.functional.cross_entropy(logits_BK.double(), labels_B))
    assert records[-1]["dev_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("setting", LOW)
def test_a_resumed_run_is_the_unbroken_one(backbones_dir: Path, tmp_path: Path, setting: str) -> None:
    described = _described(backbones_dir, precision=setting)
    whole, records = _fit(described, keep=tmp_path)
    resumed, after = _fit(described, resume_from=tmp_path / "1")
    assert [record["dev_loss"] for record in after] == [records[1]["dev_loss"]]
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_a_gradient_beyond_fp16_costs_a_step_and_halves_the_scale(
    backbones_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = _described(backbones_dir, precision="fp16")
    first = 2.0**40
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=first))
    model, records = _fit(described, keep=tmp_path)
    steps = len(records) * len(TRAIN)
    scale = json.loads((tmp_path / "2" / "training" / "state.json").read_text())["scaler"]["scale"]
    assert scale == first / 2**steps, "every step overflowed"
    for (name, expected), found in zip(build(described).named_parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found), name
