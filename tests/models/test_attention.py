"""Whisper's attention is that of transformers in outputs, gradients and order of weights, with fewer kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from dispatched import Kernels
from transformers import WhisperConfig
from transformers.models.whisper import modeling_whisper as transformers_whisper

from ser_ray.models.attention import WhisperAttention, padding
from ser_ray.models.backbones import frame_mask

FRAMES = (90, 41, 7)


def pair(width: int, heads: int) -> tuple[WhisperAttention, transformers_whisper.WhisperAttention]:
    """Ours and transformers' own, of the same random weights."""
    config = WhisperConfig(d_model=width, encoder_attention_heads=heads, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = transformers_whisper.WhisperAttention(width, heads, config=config)
    return WhisperAttention(copy.deepcopy(theirs)), theirs


def ragged(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_BFD, with what must not matter behind the end of each, and mask_BF."""
    generator = torch.Generator().manual_seed(5)
    hidden_BFD = torch.randn(len(FRAMES), max(FRAMES), width, generator=generator)
    return hidden_BFD, frame_mask(torch.tensor(FRAMES), max(FRAMES))


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (36, 3)], ids=["a scale of two's power", "another scale"])
@pytest.mark.parametrize("padded", [True, False])
def test_outputs_and_all_gradients_are_those_of_transformers(width: int, heads: int, padded: bool) -> None:
    (ours, theirs), (hidden_BFD, mask_BF) = pair(width, heads), ragged(width)
    found = []
    for attention, mask in ((ours, padding(mask_BF, torch.float32)), (theirs, mask_BF[:, None, None])):
        given_BFD = hidden_BFD.clone().requires_grad_()
        output_BFD, weights = attention(hidden_states=given_BFD, attention_mask=mask if padded else None)
        assert weights is None
        (output_BFD[mask_BF] ** 2).sum().backward()
        gradients = {name: parameter.grad for name, parameter in attention.named_parameters()}
        found.append({"output": output_BFD[mask_BF], "input": given_BFD.grad} | gradients)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_the_weights_keep_their_order() -> None:
    """A saved optimiser's moments are numbered by it."""
    ours, theirs = pair(36, 3)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_dropout_is_that_of_training_alone() -> None:
    ours, _ = pair(36, 3)
    ours.dropout = 0.5
    hidden_BFD, _ = ragged(36)
    assert torch.equal(ours.eval().attend(hidden_BFD, None), ours.attend(hidden_BFD, None))
    assert not torch.allclose(ours.train().attend(hidden_BFD, None), ours.attend(hidden_BFD, None))


def test_nothing_is_copied_or_scaled_outside_of_the_one_operation() -> None:
    """Four projections and the attention between them: five kernels."""
    ours, _ = pair(128, 2)
    hidden_BFD, mask_BF = ragged(128)
    mask = padding(mask_BF, torch.float32)
    with torch.no_grad(), Kernels() as kernels:
        ours(hidden_BFD, mask)
    products = kernels.names["addmm"] + kernels.names["mm"]
    assert (products, kernels.names.total()) == (4, 5), kernels.names
