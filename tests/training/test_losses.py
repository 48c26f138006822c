"""Losses of an utterance against torch's own and plain loops; and a loss that is added in one file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from added_fixtures import config_accepts, trains_and_is_saved
from backbone_fixtures import data_of, experiment, logits, noise_batch, tone_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from ser_ray.config.choices import LOSSES
from ser_ray.models.classifier import build
from ser_ray.training import loop, losses, step
from ser_ray.training.losses.cross_entropy import cross_entropy
from ser_ray.training.losses.focal import GAMMA, focal

LOGITS = arrays(np.float32, (6, 4), elements=st.floats(-30, 30, width=32))
LABELS_B = torch.tensor([0, 1, 2, 3, 1, 0])
SMOOTHED = """
from torch import nn

def Added(logits_BK, labels_B):
    return nn.functional.cross_entropy(logits_BK, labels_B, label_smoothing=0.1, reduction="none")
"""


@given(logits_BK=LOGITS, weights=st.lists(st.floats(0.1, 9), min_size=4, max_size=4))
@settings(deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_with_class_weights_is_that_of_torch(dtype, logits_BK, weights):
    """The sum and its gradients."""
    weights_K = torch.tensor(weights)
    ours, theirs = (torch.from_numpy(logits_BK).to(dtype).requires_grad_() for _ in range(2))
    found = step.weighted_loss(ours, LABELS_B, weights_K, losses.of("cross_entropy"))
    expected = nn.functional.cross_entropy(theirs.float(), LABELS_B, weight=weights_K, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@given(logits_BK=LOGITS)
@settings(deadline=None)
def test_focal_is_its_formula(logits_BK):
    found_B = focal(torch.from_numpy(logits_BK), LABELS_B)
    for row, label in enumerate(LABELS_B.tolist()):
        scores = logits_BK[row].astype(np.float64)
        log_p = scores[label] - math.log(np.exp(scores).sum())
        expected = -((1 - math.exp(log_p)) ** GAMMA) * log_p
        assert float(found_B[row]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("certainty", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_every_loss_keeps_the_contract(name, certainty):
    """One number an utterance, in fp32, that depends on it alone; it and its gradient are finite, however certain."""
    logits_BK = (certainty * nn.functional.one_hot(LABELS_B, 4)).float().requires_grad_()
    loss_B = losses.of(name)(logits_BK, LABELS_B)
    assert (loss_B.shape, loss_B.dtype) == ((6,), torch.float32)
    torch.testing.assert_close(losses.of(name)(logits_BK[3:4], LABELS_B[3:4]), loss_B[3:4])
    assert (loss_B >= 0).all()
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all()
    assert torch.isfinite(logits_BK.grad).all()


def test_focal_counts_what_is_certain_a_hundred_times_less():
    """The paper's example: p = 0.9 of two classes."""
    logits_BK = torch.tensor([[math.log(9.0), 0.0]])
    label_B = torch.tensor([0])
    assert float(cross_entropy(logits_BK, label_B) / focal(logits_BK, label_B)) == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_training_uses_the_loss_and_dev_cross_entropy(backbones_dir, name):
    """With rates of next to nothing the model of every step is the untrained one."""
    described = experiment(
        backbones_dir / "whisper",
        adapter={"dropout": 0.0},
        head={"dropout": 0.0},
        optimizer={"lr": 1e-12, "head_lr": 1e-12},
        epochs=1,
        loss=name,
    )
    train, dev = tone_batches(15, 3), tone_batches(9, 3, seed=1)
    model, records = build(described), []
    loop.fit(model, data_of(lambda epoch: train, dev), lambda record, save: records.append(record))
    for key, batches, loss in (("train_loss", train, losses.of(name)), ("dev_loss", dev, cross_entropy)):
        every_N = torch.cat([loss(logits(model, batch), batch.labels_B) for batch in batches])
        assert records[0][key] == pytest.approx(float(every_N.mean()), rel=1e-4), key


def test_a_loss_is_added_in_one_file_and_one_line(backbones_dir, tmp_path, add):
    config_accepts(tmp_path, "smoothed", lambda: add(LOSSES, "smoothed", SMOOTHED), loss="smoothed")
    described = experiment(backbones_dir / "whisper", adapter={"first_layer": 1}, loss="smoothed", epochs=1)
    trains_and_is_saved(described, tmp_path)
    model, batch, weights_K = build(described).eval(), noise_batch(), torch.tensor([2.0, 1.0, 0.5])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found = step.add_gradients(model, batch, weights_K, 1.0, scaler, described, last=True)
    smoothed_B = nn.functional.cross_entropy(
        logits(model, batch), batch.labels_B, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(found, (weights_K[batch.labels_B] * smoothed_B).sum())
