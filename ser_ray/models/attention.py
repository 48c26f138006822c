"""Attention in place of transformers'. In Whisper's blocks it takes nine kernels fewer in a training step of a block.

transformers multiplies every query by 1 / sqrt(d) and copies queries, keys and values head by head, and padding, given
as true and false, becomes a summand in every block again. `scaled_dot_product_attention` scales by itself and reads
heads where they lie, and padding becomes a summand once for all blocks. Names and weights are those of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Takes over the layers and parameters of a block's attention. Its forward is what a family's block expects."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.num_heads: int = theirs.num_heads
        self.dropout: float = theirs.dropout
        # In their order, by which a saved optimiser's moments are numbered.
        for name, parameter in theirs.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in theirs.named_children():
            self.add_module(name, child)

    def attend(self, hidden_BFD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The output (B, F, D). ``mask`` is added to the scores: (B, 1, 1, F), or (B, H, F, F) for H heads."""
        mixed_BHFd = functional.scaled_dot_product_attention(
            self._heads(self.q_proj(hidden_BFD)),
            self._heads(self.k_proj(hidden_BFD)),
            self._heads(self.v_proj(hidden_BFD)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        output_BFD: torch.Tensor = self.out_proj(mixed_BHFd.transpose(1, 2).flatten(2))
        return output_BFD

    def _heads(self, hidden_BFD: torch.Tensor) -> torch.Tensor:
        """(B, H, F, d), d being the width of a head."""
        return hidden_BFD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class WhisperAttention(Attention):
    """In the place of a block's attention of the same name in transformers."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """The output (B, F, D), and no weights. The names are those that the block calls.

        ``attention_mask`` is `padding` of the batch, or None without any.
        """
        return self.attend(hidden_states, attention_mask), None


def padding(mask_BF: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, 1, F): 0 for real frames, minus infinity for padding."""
    zeros_BF = torch.zeros(mask_BF.shape, dtype=dtype, device=mask_BF.device)
    return zeros_BF.masked_fill(~mask_BF, -math.inf)[:, None, None]
