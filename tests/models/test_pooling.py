"""Poolings against plain loops, from frames and from moments; and a pooling that is added in one file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from added_fixtures import config_accepts, trains_and_is_saved
from backbone_fixtures import experiment, logits, noise_batch, tone_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ser_ray.config.choices import POOLINGS
from ser_ray.models import pooling, prefix
from ser_ray.models.classifier import build
from ser_ray.models.moments import moments
from ser_ray.models.pooling import normalise
from ser_ray.models.pooling.mean import masked_mean
from ser_ray.models.pooling.statistics import masked_statistics, weighted_statistics
from ser_ray.training.probe import start_from_probe

FINITE = st.floats(-100, 100, width=32)
FRAMES = (7, 4, 1)
MASK_BF = torch.arange(7) < torch.tensor(FRAMES)[:, None]
WIDTH = 5
MAX = """
import torch
from ser_ray.models.pooling import Pooling

class Added(Pooling):
    def forward(self, hidden_BFD, mask_BF):
        return hidden_BFD.masked_fill(~mask_BF[..., None], -torch.inf).amax(1)
"""


def _states(garbage: float = 1e4) -> list[torch.Tensor]:
    """Three layers of ragged utterances, ``garbage`` behind them."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(FRAMES), max(FRAMES), WIDTH, generator=generator) for _ in range(3)]
    return [state.masked_fill(~MASK_BF[..., None], garbage) for state in states]


@given(
    hidden_BFD=arrays(np.float32, (3, 5, 4), elements=FINITE),
    frames=st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_statistics_are_those_of_the_real_frames(hidden_BFD, frames):
    mask_BF = torch.arange(5) < torch.tensor(frames)[:, None]
    pooled_BP = masked_statistics(torch.from_numpy(hidden_BFD), mask_BF).numpy()
    mean_BD = masked_mean(torch.from_numpy(hidden_BFD), mask_BF).numpy()
    for row, count in enumerate(frames):
        own_FD = hidden_BFD[row, :count].astype(np.float64)
        expected = np.concatenate([own_FD.mean(0), np.sqrt(own_FD.var(0) + 1e-6)])
        np.testing.assert_allclose(pooled_BP[row], expected, atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(mean_BD[row], own_FD.mean(0), atol=1e-3, rtol=1e-4)


def test_weighted_statistics_are_numpys_weighted_average():
    rng = np.random.default_rng(0)
    hidden_FD, weights_F = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6))
    mean_D = np.average(hidden_FD, axis=0, weights=weights_F)
    deviation_D = np.sqrt(np.average((hidden_FD - mean_D) ** 2, axis=0, weights=weights_F) + 1e-6)
    pooled_1P = weighted_statistics(torch.from_numpy(hidden_FD)[None], torch.from_numpy(weights_F)[None])
    np.testing.assert_allclose(pooled_1P[0].numpy(), np.concatenate([mean_D, deviation_D]), rtol=1e-5)


def test_attention_starts_as_plain_statistics():
    attentive, statistics = (pooling.of(name)(WIDTH) for name in ("attentive", "statistics"))
    hidden_BFD = _states()[0]
    torch.testing.assert_close(attentive(hidden_BFD, MASK_BF), statistics(hidden_BFD, MASK_BF))


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_keeps_the_contract(name):
    """The width that it says, no trace of padding, and the same from the moments that it says."""
    pool = pooling.of(name)(WIDTH)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(torch.randn_like(parameter))
        states = _states()
        pooled_BP = pool(states[0], MASK_BF)
        assert pooled_BP.shape == (len(FRAMES), pool.output_width)
        torch.testing.assert_close(pool(_states(garbage=-7.0)[0], MASK_BF), pooled_BP)
        torch.testing.assert_close(pool(states[0][1:2, :4], MASK_BF[1:2, :4]), pooled_BP[1:2])
        if pool.moments is None:
            return
        mix_S = torch.tensor([0.7, -0.4, 1.3])
        mixed_BFD = sum(normalise(state) * weight for state, weight in zip(states, mix_S, strict=True))
        moments_BMD = moments(states, MASK_BF, covariances=pool.moments == "statistics")
        found_BP = pool.from_moments(moments_BMD, mix_S)
        torch.testing.assert_close(found_BP, pool(mixed_BFD, MASK_BF), rtol=1e-4, atol=1e-5)


# -- a pooling that is added: one file, one line


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_a_pooling_is_added_in_one_file_and_one_line(backbones_dir, tmp_path, add, method):
    adapter = {"method": method, "first_layer": 1}
    config_accepts(tmp_path, "max", lambda: add(POOLINGS, "max", MAX), head={"pooling": "max"})
    described = experiment(backbones_dir / "whisper", adapter=adapter, head={"pooling": "max"}, epochs=1)
    assert prefix.of(described, "fp32").moments is None, "frames are cached"
    trains_and_is_saved(described, tmp_path)


@pytest.mark.parametrize("mix", ["weighted", "concat"])
def test_a_probe_sees_what_the_added_pooling_makes(backbones_dir, add, mix):
    add(POOLINGS, "max", MAX)
    model = build(experiment(backbones_dir / "whisper", head={"pooling": "max", "init": "probe", "layer_mix": mix}))
    train, dev = tone_batches(30, 3, seed=1), tone_batches(18, 3, seed=2)
    layer = start_from_probe(model, train, dev, lambda value: [value])
    batch = noise_batch()
    with torch.inference_mode():
        layers = model.pooled_layers(batch.inputs, batch.lengths_B)
        hiddens, mask_BF = model.backbone(batch.inputs, batch.lengths_B)
        expected_BD = torch.stack([normalise(hiddens[layer])[row, own].amax(0) for row, own in enumerate(mask_BF)])
        torch.testing.assert_close(layers[layer], expected_BD)
        pooled_BP = torch.cat(layers, dim=-1) if mix == "concat" else expected_BD
        torch.testing.assert_close(logits(model, batch), model.head.classify(pooled_BP))
