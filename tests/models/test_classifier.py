"""Layer mix, masked pooling and classifier against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_fixtures import LAYERS, WIDTH, experiment, noise_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ser_ray.models.classifier import Head, build
from ser_ray.models.pooling import masked_statistics, normalise, weighted_statistics

FINITE = st.floats(-100, 100, width=32)


def _normalised(hidden_FD: np.ndarray) -> np.ndarray:
    hidden_FD = hidden_FD.astype(np.float64)
    return (hidden_FD - hidden_FD.mean(-1, keepdims=True)) / np.sqrt(hidden_FD.var(-1, keepdims=True) + 1e-5)


def _hiddens(seed: int = 0, frames: tuple[int, ...] = (7, 3, 1)) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of 3 layers, garbage beyond the end of an utterance."""
    generator = torch.Generator().manual_seed(seed)
    hiddens = [torch.randn(len(frames), max(frames), WIDTH, generator=generator) * 3 + 1 for _ in range(3)]
    mask_BF = torch.arange(max(frames)) < torch.tensor(frames)[:, None]
    for hidden_BFD in hiddens:
        hidden_BFD[~mask_BF] = 1e4
    return hiddens, mask_BF


def _head(**options: object) -> Head:
    return Head(experiment("none", head=options), num_layers=2, width=WIDTH).eval()


@given(
    hidden_BFD=arrays(np.float32, (3, 5, 4), elements=FINITE),
    frames=st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_statistics_are_those_of_the_real_frames(hidden_BFD: np.ndarray, frames: list[int]) -> None:
    mask_BF = torch.arange(5) < torch.tensor(frames)[:, None]
    pooled_BP = masked_statistics(torch.from_numpy(hidden_BFD), mask_BF).numpy()
    mean_BD = masked_statistics(torch.from_numpy(hidden_BFD), mask_BF, deviation=False).numpy()
    for row, count in enumerate(frames):
        own_FD = hidden_BFD[row, :count].astype(np.float64)
        expected = np.concatenate([own_FD.mean(0), np.sqrt(own_FD.var(0) + 1e-6)])
        np.testing.assert_allclose(pooled_BP[row], expected, atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(mean_BD[row], own_FD.mean(0), atol=1e-3, rtol=1e-4)


def test_weighted_statistics_are_numpys_weighted_average() -> None:
    rng = np.random.default_rng(0)
    hidden_FD, weights_F = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6))
    mean_D = np.average(hidden_FD, axis=0, weights=weights_F)
    deviation_D = np.sqrt(np.average((hidden_FD - mean_D) ** 2, axis=0, weights=weights_F) + 1e-6)
    pooled_1P = weighted_statistics(torch.from_numpy(hidden_FD)[None], torch.from_numpy(weights_F)[None])
    np.testing.assert_allclose(pooled_1P[0].numpy(), np.concatenate([mean_D, deviation_D]), rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_the_head_is_a_loop_over_utterances(pooling: str) -> None:
    head = _head(pooling=pooling)
    with torch.no_grad():
        head.mix_L.copy_(torch.tensor([0.2, -0.5, 1.1]))
        if pooling == "attentive":
            torch.nn.init.normal_(head.score[2].weight, generator=torch.Generator().manual_seed(1))
    hiddens, mask_BF = _hiddens()
    with torch.no_grad():
        logits_BK = head(hiddens, mask_BF).numpy()
    for row, frames in enumerate(mask_BF.sum(1).tolist()):
        mixed_FD = sum(w * _normalised(h[row, :frames].numpy()) for w, h in zip((0.2, -0.5, 1.1), hiddens, strict=True))
        weights_F = np.full(frames, 1 / frames)
        if pooling == "attentive":
            inner, outer = (m.weight.detach().numpy() for m in (head.score[0], head.score[2]))
            scores_F = (np.tanh(mixed_FD @ inner.T + head.score[0].bias.detach().numpy()) @ outer.T)[:, 0]
            weights_F = np.exp(scores_F - scores_F.max()) / np.exp(scores_F - scores_F.max()).sum()
        pooled_P = weights_F @ mixed_FD
        if pooling != "mean":
            pooled_P = np.concatenate([pooled_P, np.sqrt(weights_F @ (mixed_FD - pooled_P) ** 2 + 1e-6)])
        linear = head.classifier[-1]
        expected_K = pooled_P @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        np.testing.assert_allclose(logits_BK[row], expected_K, atol=2e-4)


def test_attention_starts_as_plain_statistics() -> None:
    (hidden_BFD, *_), mask_BF = _hiddens()
    attentive, statistics = _head(pooling="attentive"), _head(pooling="statistics")
    torch.testing.assert_close(attentive.pool(hidden_BFD, mask_BF), statistics.pool(hidden_BFD, mask_BF))


def test_the_mix_starts_as_the_mean_of_normalised_layers() -> None:
    hiddens, _ = _hiddens()
    expected = torch.stack([normalise(h) for h in hiddens]).mean(0)
    torch.testing.assert_close(_head(layer_mix="weighted").mix(hiddens), expected)
    torch.testing.assert_close(_head(layer_mix="last").mix(hiddens), normalise(hiddens[-1]))


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_concatenated_layers_are_pooled_one_by_one(pooling: str) -> None:
    head, single = (_head(pooling=pooling, layer_mix=mix) for mix in ("concat", "last"))
    hiddens, mask_BF = _hiddens()
    if pooling == "attentive":
        torch.nn.init.normal_(head.score[2].weight)
        single.score.load_state_dict(head.score.state_dict())
    expected_BP = torch.cat([single.pool(normalise(hidden), mask_BF) for hidden in hiddens], dim=1)
    torch.testing.assert_close(head(hiddens, mask_BF), head.classifier(expected_BP))
    assert not head.mix_L.requires_grad


def test_a_single_layer_mix_does_not_learn() -> None:
    assert not _head(layer_mix="last").mix_L.requires_grad
    assert _head(layer_mix="weighted").mix_L.requires_grad


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_width_of_the_hidden_layer(hidden: int) -> None:
    head = _head(hidden=hidden, pooling="mean")
    linears = [m for m in head.classifier if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in linears] == ([WIDTH, hidden] if hidden else [WIDTH])
    assert linears[-1].out_features == 3


def test_initial_weights_depend_on_the_seed_alone(backbones_dir: Path) -> None:
    def states(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return build(experiment(backbones_dir / "whisper", seed=seed)).state_dict()

    first, same, other = states(1), states(1), states(2)
    assert all(torch.equal(first[key], same[key]) for key in first)
    differing = {key for key in first if not torch.equal(first[key], other[key])}
    assert "head.classifier.1.weight" in differing
    assert any(".lora_A." in key for key in differing)
    assert all(".lora_A." in key or key.startswith("head.") for key in differing)


def test_logits_are_single_precision_and_one_a_class(backbones_dir: Path) -> None:
    model, batch = build(experiment(backbones_dir / "whisper")), noise_batch()
    hiddens, _ = model.backbone(batch.inputs, batch.lengths_B)
    logits_BK = model(batch.inputs, batch.lengths_B)
    assert len(hiddens) == LAYERS + 1
    assert logits_BK.shape == (3, 3)
    assert logits_BK.dtype == torch.float32


@pytest.mark.parametrize("variant", ["whisper", "wav2vec2-group", "wavlm-layer"])
def test_features_are_masked_in_training_only(variant: str, backbones_dir: Path) -> None:
    batch = noise_batch()
    plain = build(experiment(backbones_dir / variant, adapter={"method": "frozen"}, head={"dropout": 0.0}))
    varied = build(
        experiment(
            backbones_dir / variant,
            adapter={"method": "frozen"},
            head={"dropout": 0.0},
            augment={"channel_mask": 0.3, "time_mask": 0.3},
        )
    )
    with torch.inference_mode():
        expected = plain.eval()(batch.inputs, batch.lengths_B)
        assert torch.equal(varied.eval()(batch.inputs, batch.lengths_B), expected)
        assert torch.allclose(plain.train()(batch.inputs, batch.lengths_B), expected)
        assert not torch.allclose(varied.train()(batch.inputs, batch.lengths_B), expected)
