"""The built-in head against plain loops; its names in a file; and a head that is added in one file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from added_fixtures import config_accepts, trains_and_is_saved
from backbone_fixtures import LAYERS, WIDTH, experiment, noise_batch
from safetensors.torch import load_file, save_file

from ser_ray import config
from ser_ray.config.choices import HEADS
from ser_ray.models import checkpoint, heads, prefix
from ser_ray.models.classifier import build
from ser_ray.models.heads import Head
from ser_ray.models.heads.pooled import PooledHead
from ser_ray.models.pooling import normalise
from ser_ray.runtime import plan
from ser_ray.schema import UserError
from ser_ray.training.inference import embed

LAST_STATE = """
import torch
from torch import nn
from ser_ray.models.heads import Head
from ser_ray.models.pooling import normalise
from ser_ray.models.pooling.mean import masked_mean
from ser_ray.models.precision import in_fp32

class Added(Head):
    def __init__(self, experiment, num_layers, width):
        super().__init__(experiment, num_layers, width)
        self.embedding_width = 7
        self.down = nn.Linear(width, 7)
        self.out = nn.Linear(7, len(experiment.emotions))

    @in_fp32
    def embed(self, hiddens, mask_BF):
        return torch.tanh(self.down(masked_mean(normalise(hiddens[-1]), mask_BF)))

    @in_fp32
    def classify(self, pooled_BP):
        return self.out(pooled_BP)
"""


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


def _head(**options: object) -> PooledHead:
    return PooledHead(experiment("none", head=options), num_layers=2, width=WIDTH).eval()


def test_every_kind_is_a_head():
    for kind in HEADS:
        assert issubclass(heads.of(config.Head(kind=kind)), Head)


@pytest.mark.parametrize("pooling", ["mean", "statistics", "attentive"])
def test_the_head_is_a_loop_over_utterances(pooling: str) -> None:
    head = _head(pooling=pooling)
    with torch.no_grad():
        head.mix_L.copy_(torch.tensor([0.2, -0.5, 1.1]))
        if pooling == "attentive":
            torch.nn.init.normal_(head.pooling.score[2].weight, generator=torch.Generator().manual_seed(1))
    hiddens, mask_BF = _hiddens()
    with torch.no_grad():
        logits_BK = head(hiddens, mask_BF).numpy()
    for row, frames in enumerate(mask_BF.sum(1).tolist()):
        mixed_FD = sum(w * _normalised(h[row, :frames].numpy()) for w, h in zip((0.2, -0.5, 1.1), hiddens, strict=True))
        weights_F = np.full(frames, 1 / frames)
        if pooling == "attentive":
            score = head.pooling.score
            inner, outer = (m.weight.detach().numpy() for m in (score[0], score[2]))
            scores_F = (np.tanh(mixed_FD @ inner.T + score[0].bias.detach().numpy()) @ outer.T)[:, 0]
            weights_F = np.exp(scores_F - scores_F.max()) / np.exp(scores_F - scores_F.max()).sum()
        pooled_P = weights_F @ mixed_FD
        if pooling != "mean":
            pooled_P = np.concatenate([pooled_P, np.sqrt(weights_F @ (mixed_FD - pooled_P) ** 2 + 1e-6)])
        linear = head.classifier[-1]
        expected_K = pooled_P @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        np.testing.assert_allclose(logits_BK[row], expected_K, atol=2e-4)


def test_the_mix_has_the_gradients_of_a_sum_of_products() -> None:
    """Its weights are those of the norms of the states."""
    generator = torch.Generator().manual_seed(4)
    head, hiddens = _head(), [torch.randn(2, 5, WIDTH, generator=generator).requires_grad_() for _ in range(LAYERS + 1)]
    head.mix_L.data = torch.linspace(-0.5, 1.1, LAYERS + 1)
    centred = [h - h.mean(-1, keepdim=True) for h in hiddens]
    normed = [c / torch.sqrt(c.square().mean(-1, keepdim=True) + 1e-5) for c in centred]
    expected = sum(weight * state for weight, state in zip(head.mix_L, normed, strict=True))
    upstream = torch.randn(2, 5, WIDTH, generator=generator)
    wanted = torch.autograd.grad(expected, [head.mix_L, *hiddens], upstream)
    torch.testing.assert_close(torch.autograd.grad(head.mix(hiddens), [head.mix_L, *hiddens], upstream), wanted)


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
        torch.nn.init.normal_(head.pooling.score[2].weight)
        single.pooling.load_state_dict(head.pooling.state_dict())
    expected_BP = torch.cat([single.embed([hidden], mask_BF) for hidden in hiddens], dim=1)
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


# -- its names in a file


def test_attentive_pooling_is_written_and_read_under_the_names_of_0_1_0(backbones_dir, tmp_path):
    """The file is made here, name by name, and its answer is computed from it alone."""
    described = experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head={"pooling": "attentive"})
    shapes = {
        "mix_L": (LAYERS + 1,),
        "score.0.weight": (128, WIDTH),
        "score.0.bias": (128,),
        "score.2.weight": (1, 128),
        "center_P": (2 * WIDTH,),
        "scale_P": (2 * WIDTH,),
        "classifier.1.weight": (3, 2 * WIDTH),
        "classifier.1.bias": (3,),
    }
    generator = torch.Generator().manual_seed(0)
    old = {name: 0.5 + 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model = build(described)
    checkpoint.save(model, tmp_path, {})
    assert load_file(tmp_path / "head.safetensors").keys() == old.keys()
    save_file(old, tmp_path / "head.safetensors")
    resumed = build(described)
    checkpoint.load_weights(resumed, tmp_path)
    batch = noise_batch((0.5,))
    with torch.inference_mode():
        (*states,) = (state[0] for state in model.backbone.eval()(batch.inputs, batch.lengths_B)[0])
        mixed_FD = sum(w * normalise(state) for w, state in zip(old["mix_L"], states, strict=True))
        inner_FH = torch.tanh(mixed_FD @ old["score.0.weight"].T + old["score.0.bias"])
        weights_F = (inner_FH @ old["score.2.weight"][0]).softmax(0)
        mean_D = weights_F @ mixed_FD
        deviation_D = (weights_F @ (mixed_FD - mean_D).square() + 1e-6).sqrt()
        pooled_P = (torch.cat([mean_D, deviation_D]) - old["center_P"]) / old["scale_P"]
        expected_K = old["classifier.1.weight"] @ pooled_P + old["classifier.1.bias"]
        for read in (checkpoint.load(tmp_path), resumed.eval()):
            torch.testing.assert_close(read(batch.inputs, batch.lengths_B)[0], expected_K, rtol=1e-4, atol=1e-4)


# -- a head that is added: one file, one line


@pytest.mark.parametrize(("method", "mix"), [("frozen", "weighted"), ("frozen", "last"), ("lora", "last")])
def test_a_head_is_added_in_one_file_and_one_line(backbones_dir, tmp_path, add, method, mix):
    section = {"kind": "last_state", "layer_mix": mix}
    config_accepts(tmp_path, "last_state", lambda: add(HEADS, "last_state", LAST_STATE), head=section)
    adapter = {"method": method, "first_layer": 1}
    described = experiment(backbones_dir / "whisper", adapter=adapter, head=section, epochs=1)
    assert prefix.of(described, "fp32").moments is None, "frames are cached"
    model = trains_and_is_saved(described, tmp_path)
    batch = noise_batch()
    samples = [(row[:length].numpy(), 16_000) for row, length in zip(batch.inputs, batch.lengths_B, strict=True)]
    assert embed(model, samples).shape == (3, 7)


def test_a_cache_is_another_one_for_another_kind_of_head(backbones_dir, add):
    """Of a frozen backbone the built-in one needs moments, this one needs frames."""
    add(HEADS, "last_state", LAST_STATE)
    pooled, other = (
        experiment(backbones_dir / "whisper", adapter={"method": "frozen"}, head={"kind": kind, "pooling": "mean"})
        for kind in ("pooled", "last_state")
    )
    assert plan.cache_key(pooled) != plan.cache_key(other)
    assert [prefix.of(one, "fp32").moments for one in (pooled, other)] == ["mean", None]


def test_a_head_that_cannot_start_from_a_probe_says_so_before_any_work(backbones_dir, add):
    add(HEADS, "last_state", LAST_STATE)
    described = experiment(backbones_dir / "whisper", head={"kind": "last_state", "init": "probe"})
    said = r"head\.init: probe: head\.kind last_state cannot start from a probe; set it to random"
    with pytest.raises(UserError, match=said):
        build(described)
    search = {"head.kind": {"choice": ["pooled", "last_state"]}}
    base = experiment(backbones_dir / "whisper", head={"init": "probe"})
    with pytest.raises(UserError, match=said):
        plan.check(config.SearchSpace.model_validate({"experiment": config.to_dict(base), "search": search}))
