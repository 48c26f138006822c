"""One step: loss weights, learning rate, accumulation, clipping, decay."""

from __future__ import annotations

from pathlib import Path

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
from ser_ray.training import loop, step
from ser_ray.training.losses.cross_entropy import cross_entropy


@pytest.fixture
def tiny(backbones_dir: Path) -> Experiment:
    """LoRA on Whisper, at rates that are told apart."""
    return experiment(backbones_dir / "whisper", adapter={"rank": 4}, optimizer={"lr": 3e-3, "head_lr": 5e-2})


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def _still(described: Experiment) -> Experiment:
    """Without dropout."""
    return with_sections(described, adapter={"method": "lora", "rank": 4, "dropout": 0.0}, head={"dropout": 0.0})


def _of(batch: Batch, rows: list[int]) -> Batch:
    length = int(batch.lengths_B[rows].max())
    ids = tuple(batch.utterance_ids[row] for row in rows)
    return Batch(ids, batch.inputs[rows, :length], batch.lengths_B[rows], batch.labels_B[rows])


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _expected(described: Experiment, batch: Batch, weights_K: torch.Tensor) -> dict[str, torch.Tensor]:
    """A plain loop over single utterances."""
    model, held = build(described), float(weights_K[batch.labels_B].sum())
    for row in range(len(batch)):
        one = _of(batch, [row])
        loss = nn.functional.cross_entropy(model(one.inputs, one.lengths_B), one.labels_B)
        (weights_K[one.labels_B[0]] * loss / held).backward()
    return _gradients(model)


LENGTHS = (0.3, 0.9, 0.5, 0.4, 0.7, 0.6, 0.35)
CUTS = ([[0, 1, 2, 3, 4, 5, 6]], [[0], [1], [2], [3], [4], [5], [6]], [[2, 6], [0], [1, 3, 4, 5]])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (9.0, 1.0, 1.0)])
@pytest.mark.parametrize("cut", CUTS)
def test_an_utterance_weighs_the_same_however_a_step_is_cut_into_batches(
    tiny: Experiment, cut: list[list[int]], weights: tuple[float, ...]
) -> None:
    described, batch, weights_K = _still(tiny), noise_batch(LENGTHS), torch.tensor(weights)
    expected, model = _expected(described, batch, weights_K), build(described)
    held = float(weights_K[batch.labels_B].sum())
    total = torch.zeros(())
    for number, rows in enumerate(cut):
        last = number == len(cut) - 1
        total += step.add_gradients(model, _of(batch, rows), weights_K, 1 / held, _scaler(), described, last)
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    loss = nn.functional.cross_entropy(logits(build(described), batch), batch.labels_B, weight=weights_K)
    assert float(total) / held == pytest.approx(float(loss), rel=1e-4)


def test_what_another_process_counts_adds_nothing(tiny: Experiment) -> None:
    model, batch = build(_still(tiny)), noise_batch(LENGTHS)
    step.add_gradients(model, batch, torch.ones(3), 0.0, _scaler(), tiny, last=True)
    found = _gradients(model)
    assert found
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("balanced", [True, False])
def test_balanced_weights_make_the_share_of_every_emotion_equal(tiny: Experiment, balanced: bool) -> None:
    """The gradient of the loss by the logits, in absolute value and with all guesses alike: what an emotion weighs."""
    counts = (60, 12, 4)
    label_N = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))[torch.randperm(76)]
    described = tiny if balanced else with_sections(tiny, class_weights="none")
    weights_K = loop.class_weights(described, counts)
    logits_NK = torch.zeros(76, 3, requires_grad=True)
    held = float(weights_K[label_N].sum())
    for rows in (range(10), range(10, 11), range(11, 76)):  # batches of one step
        own = slice(rows.start, rows.stop)
        (step.weighted_loss(logits_NK[own], label_N[own], weights_K, cross_entropy) / held).backward()
    weight_N = logits_NK.grad.abs().sum(1)
    shares = np.array([float(weight_N[label_N == label].sum() / weight_N.sum()) for label in range(3)])
    expected = np.full(3, 1 / 3) if balanced else np.array(counts) / 76
    np.testing.assert_allclose(shares, expected, rtol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_is_in_fp32_whatever_the_model_computes_in(tiny: Experiment, precision: str) -> None:
    described = with_sections(_still(tiny), precision=precision)
    loss = step.add_gradients(
        build(described), noise_batch(), torch.tensor([9.0, 1.0, 1.0]), 1 / 11, _scaler(), described, True
    )
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


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


def test_the_rate_and_the_clip_reach_the_optimizer(tiny: Experiment) -> None:
    model, batch = build(tiny), noise_batch()
    optimizer = loop.make_optimizer(model)
    step.add_gradients(model, batch, torch.ones(3), 1 / 3, _scaler(), tiny, last=True)
    step.apply(optimizer, _scaler(), tiny, 0.25)
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
