"""One step: loss weights, learning rate, accumulation, clipping, decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_fixtures import experiment, logits, noise_batch, tone_batches, with_sections
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models.classifier import build
from ser_ray.speech.stream import Batch
from ser_ray.training import loop


@pytest.fixture
def tiny(backbones_dir: Path) -> Experiment:
    """LoRA on Whisper, at rates that are told apart."""
    return experiment(backbones_dir / "whisper", adapter={"rank": 4}, optimizer={"lr": 3e-3, "head_lr": 5e-2})


def _steps(described: Experiment, weights: torch.Tensor | None = None, batches: int = 1, **options: Any) -> list[float]:
    model = build(described)
    optimizer, batch = loop.make_optimizer(model), noise_batch()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    arguments = {"rate": 1.0, "step_now": True} | options
    criterion = nn.CrossEntropyLoss(weight=weights)
    return [
        float(loop.train_step(model, batch, criterion, optimizer, scaler, described, **arguments))
        for _ in range(batches)
    ]


def test_class_weights_change_the_loss(tiny: Experiment) -> None:
    described = with_sections(tiny, adapter={"method": "frozen"}, head={"dropout": 0.0})
    counts = (1, 5, 30)
    (plain,) = _steps(described, torch.ones(3))
    (weighted,) = _steps(described, loop.class_weights(described, counts))
    scores = logits(build(described), noise_batch())
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=np.repeat([0, 1, 2], counts)))
    losses_B = nn.functional.cross_entropy(scores, torch.arange(3), reduction="none").double()
    assert plain == pytest.approx(float(losses_B.mean()), rel=1e-5)
    assert weighted == pytest.approx(float((losses_B * weights).sum() / weights.sum()), rel=1e-5)
    assert plain != pytest.approx(weighted, rel=1e-3)


@given(counts=st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any))
@settings(deadline=None)
def test_class_weights_are_those_of_scikit_learn(counts: list[int]) -> None:
    found = loop.class_weights(experiment("none"), tuple(counts)).numpy()
    present = [label for label, count in enumerate(counts) if count]
    expected = np.ones(3)
    expected[present] = compute_class_weight("balanced", classes=np.array(present), y=np.repeat(range(3), counts))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert loop.class_weights(experiment("none", class_weights="none"), tuple(counts)).tolist() == [1.0] * 3


@given(
    total=st.integers(1, 500), warmup=st.floats(0, 0.99), steps=st.lists(st.integers(0, 600), min_size=2, max_size=2)
)
@settings(deadline=None)
def test_the_rate_rises_to_one_and_falls_to_zero(total: int, warmup: float, steps: list[int]) -> None:
    low, high = sorted(steps)
    rising = max(1, round(total * warmup)) if warmup else 0
    first, second = (loop.learning_rate_factor(step, total, warmup) for step in (low, high))
    assert 0 <= first <= 1
    assert 0 <= second <= 1
    if high < rising:
        assert first <= second
    elif low >= rising:
        assert first >= second
    if rising < total:
        assert loop.learning_rate_factor(rising, total, warmup) == 1
    assert loop.learning_rate_factor(total, total, warmup) == 0 or rising > total


def test_gradients_of_accumulated_batches_add_up(tiny: Experiment) -> None:
    described = with_sections(tiny, optimizer={"accumulate": 2}, adapter={"dropout": 0.0}, head={"dropout": 0.0})
    model, batch = build(described), noise_batch()
    optimizer, scaler = loop.make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
    parts = [
        Batch(("a",), batch.inputs[i : i + 1], batch.lengths_B[i : i + 1], batch.labels_B[i : i + 1]) for i in range(2)
    ]
    for part in parts:
        loop.train_step(model, part, nn.CrossEntropyLoss(), optimizer, scaler, described, 1.0, step_now=False)
    expected = build(described)
    both_BK = expected(batch.inputs[:2], batch.lengths_B[:2])
    nn.functional.cross_entropy(both_BK, batch.labels_B[:2]).backward()
    for (name, found), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(found.grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_rate_and_the_clip_reach_the_optimizer(tiny: Experiment) -> None:
    model, batch = build(tiny), noise_batch()
    optimizer, scaler = loop.make_optimizer(model), torch.amp.GradScaler("cpu", enabled=False)
    loop.train_step(model, batch, nn.CrossEntropyLoss(), optimizer, scaler, tiny, 0.25, True)
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {0.25 * 3e-3, 0.25 * 5e-2}
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) <= tiny.optimizer.clip * (1 + 1e-5)


def test_vectors_do_not_decay(tiny: Experiment) -> None:
    model = build(with_sections(tiny, adapter={"method": "full"}))
    optimizer = loop.make_optimizer(model)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(seen) == len({id(p) for p in seen})
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_predictions_are_made_in_evaluation_mode(tiny: Experiment) -> None:
    model = build(with_sections(tiny, head={"dropout": 0.9})).train()
    batches = tone_batches(12, 3)
    first, second = (torch.cat([logits_BK for _, logits_BK in loop.predict_batches(model, batches)]) for _ in range(2))
    assert torch.equal(first, second)
