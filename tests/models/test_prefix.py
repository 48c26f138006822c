"""What is kept of an utterance gives what the whole model gives: logits, probes, and weights after an epoch."""

from __future__ import annotations

import os

import pytest
import torch
from backbone_fixtures import (
    LAYERS,
    VARIANTS,
    WIDTH,
    cached,
    data_of,
    experiment,
    noise_batch,
    tone_batches,
    write_backbone,
)
from torch import nn

from ser_ray.models import prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch
from ser_ray.training import loop


def excite(model: EmotionClassifier) -> None:
    """Weights that begin at zero or even would hide a wrong order of the states."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


CASES = [
    ("lora", 0, "weighted", "attentive"),
    ("lora", 1, "weighted", "attentive"),
    ("lora", 1, "last", "statistics"),
    ("full", 1, "weighted", "mean"),
    ("frozen", 0, "weighted", "attentive"),
    ("frozen", 0, "last", "attentive"),
    ("frozen", 0, "weighted", "statistics"),
    ("frozen", 0, "weighted", "mean"),
    ("frozen", 0, "last", "statistics"),
    ("lora", 1, "concat", "attentive"),
    ("frozen", 0, "concat", "statistics"),
    ("frozen", 0, "concat", "mean"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("method", "first_layer", "mix", "pooling"), CASES)
def test_logits_and_gradients_are_those_of_the_whole_model(backbones_dir, variant, method, first_layer, mix, pooling):
    torch.manual_seed(1)
    model = build(
        experiment(
            backbones_dir / variant,
            adapter={"method": method, "first_layer": first_layer, "rank": 2},
            head={"layer_mix": mix, "pooling": pooling},
        )
    )
    excite(model)
    model.eval()
    batch = noise_batch((0.5, 0.83, 0.61))
    expected_BK, expected = logits_and_gradients(model, batch)
    logits_BK, gradients = logits_and_gradients(model, cached(model, batch))
    torch.testing.assert_close(logits_BK, expected_BK, rtol=5e-3, atol=5e-3)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-4)
        assert error < 0.03, (name, float(error))


def logits_and_gradients(model: EmotionClassifier, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits_BK = model(batch.inputs, batch.lengths_B)
    nn.functional.cross_entropy(logits_BK, batch.labels_B).backward()
    return logits_BK.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_a_probe_sees_the_same(backbones_dir, pooling):
    model = build(
        experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head={"pooling": pooling, "init": "probe"})
    ).eval()
    batch = noise_batch((0.5, 0.83, 0.61))
    with torch.inference_mode():
        expected = model.pooled_layers(batch.inputs, batch.lengths_B)
        kept = cached(model, batch)
        found = model.pooled_layers(kept.inputs, kept.lengths_B)
    assert len(found) == LAYERS + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(("method", "pooling"), [("lora", "attentive"), ("frozen", "statistics")])
def test_after_an_epoch_the_weights_are_those_of_training_on_waveforms(backbones_dir, method, pooling):
    """No dropout: its draws have other shapes on either way."""
    settings = experiment(
        backbones_dir / "wav2vec2-group",
        adapter={"method": method, "first_layer": 1, "rank": 2, "dropout": 0.0},
        head={"pooling": pooling, "dropout": 0.0},
        optimizer={"lr": 1e-3, "head_lr": 1e-3},
        epochs=1,
    )
    train, dev = tone_batches(36, 3), tone_batches(12, 3, seed=1)
    weights, records = [], []
    for of_cache in (False, True):
        model = build(settings)
        model.backbone.model.config.hidden_dropout = 0.0
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        given = [[cached(model, batch) for batch in part] if of_cache else part for part in (train, dev)]
        data = data_of(lambda epoch, part=given[0]: part, given[1])
        loop.fit(model, data, lambda record, save: records.append(record))
        weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    start = {n: p for n, p in build(settings).named_parameters() if p.requires_grad}
    assert records[1]["train_loss"] == pytest.approx(records[0]["train_loss"], rel=2e-3)
    assert records[1]["dev_loss"] == pytest.approx(records[0]["dev_loss"], rel=2e-3)
    for name, expected in weights[0].items():
        moved = (expected - start[name]).norm()
        assert (weights[1][name] - expected).norm() <= 0.1 * moved + 1e-6, name


def test_the_size_is_known_before(backbones_dir):
    batch = noise_batch((2.0, 2.0))
    for method, pooling in (("lora", "attentive"), ("frozen", "statistics"), ("frozen", "mean")):
        model = build(
            experiment(
                backbones_dir / "whisper", adapter={"method": method, "first_layer": 1}, head={"pooling": pooling}
            )
        )
        kept = prefix.of(model.experiment, "fp32")
        made = sum(row.nbytes for row in prefix.compute(kept, model.backbone.eval(), batch))
        assert kept.gigabytes(4.0, 2) * 1e9 == pytest.approx(made, rel=0.02)
        assert kept.shape[1] == WIDTH


def test_the_key_is_what_the_values_depend_on(backbones_dir):
    def key(backbone: str = "whisper", precision: str = "fp32", **sections: object) -> str:
        return prefix.of(experiment(backbones_dir / backbone, **sections), precision).key()

    one = {"adapter": {"method": "lora", "first_layer": 1}}
    same = key(**one)
    assert key(**one, optimizer={"lr": 1e-5}, epochs=3) == same
    assert key(adapter={"method": "lora", "first_layer": 1, "rank": 4}) == same
    others = [
        key("wavlm-group", **one),
        key(precision="bf16", **one),
        key(adapter={"method": "lora", "first_layer": 0}),
        key(adapter={"method": "qlora", "first_layer": 1}),
        key(head={"layer_mix": "last"}, **one),
        key(adapter={"method": "frozen"}),
        key(adapter={"method": "frozen"}, head={"pooling": "mean"}),
    ]
    assert len({same, *others}) == len(others) + 1


def test_other_weights_under_the_same_name_have_another_key(tmp_path):
    settings = experiment(write_backbone("whisper", tmp_path / "w"), adapter={"first_layer": 1})
    before = prefix.of(settings, "fp32").key()
    path = tmp_path / "w" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert prefix.of(settings, "fp32").key() != before


def test_a_state_beyond_fp16_is_refused(backbones_dir):
    model = build(experiment(backbones_dir / "whisper"))
    with torch.no_grad():
        model.backbone.model.embed_positions.weight.mul_(1e6)
    with pytest.raises(UserError, match="exceeds fp16"):
        prefix.compute(prefix.of(model.experiment, "fp32"), model.backbone.eval(), noise_batch((0.5,)))
