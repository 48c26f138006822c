"""WavLM's attention, in place of transformers': all of its four projections can be adapted and held in 4 bits.

The score of query i and key j is  q_i k_j / sqrt(d) + g_i b(j - i): a position bias b of their distance, which all
blocks share, times a gate g of the block's input at the query (Chen et al. 2022, arXiv 2110.13900, section 3.1).

transformers 5 passes the raw weights of the projections to `torch.nn.functional.multi_head_attention_forward`: low-rank
updates are bypassed there, and weights in 4 bits cannot be read. Here each projection is called as a layer, and
`scaled_dot_product_attention` gets bias and padding as one additive mask. Names and weights are those of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ser_ray.models import attention


class Attention(attention.Attention):
    """Takes over the layers and parameters of a block's ``WavLMAttention``, and its place."""

    gru_rel_pos_linear: nn.Module
    gru_rel_pos_const: nn.Parameter

    def forward(
        self, hidden_BFD: torch.Tensor, attention_mask: torch.Tensor, position_bias: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """What transformers' block expects: the output (B, F, D), no weights, and the bias for the next block.

        ``attention_mask`` is `attention.padding` of the batch, or 0 without any, ``position_bias`` its `position_bias`,
        for H heads.
        """
        # One pass: padding + bias x gate, (B, H, F, F).
        mask_BHFF = torch.addcmul(attention_mask, position_bias, self._gate(hidden_BFD).to(position_bias.dtype))
        return self.attend(hidden_BFD, mask_BHFF), None, position_bias

    def _gate(self, hidden_BFD: torch.Tensor) -> torch.Tensor:
        """(B, H, F, 1), what each head multiplies a query's biases by: r (u s - 1) + 2, with s a parameter."""
        eight_BFH8 = self.gru_rel_pos_linear(hidden_BFD.unflatten(-1, (self.num_heads, -1)))
        r_BFH, u_BFH = eight_BFH8.unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        gate_BFH = r_BFH * (u_BFH * self.gru_rel_pos_const.view(-1) - 1.0) + 2.0
        return gate_BFH.transpose(1, 2)[..., None]


def position_bias(weight: torch.Tensor, frames: int, max_distance: int, dtype: torch.dtype) -> torch.Tensor:
    """(H, F, F) from the embeddings of distances (buckets, H): of head, query and key.

    Only the 2 F - 1 distances that occur are looked up, and laid out along the diagonals: by their
    numbers, since a view of sliding windows cannot be exported for any F.
    """
    places = torch.arange(frames, device=weight.device)
    distances = torch.arange(1 - frames, frames, device=weight.device)
    of_distance_HN = functional.embedding(_buckets(distances, weight.shape[0], max_distance), weight).to(dtype).T
    return of_distance_HN[:, places - places[:, None] + (frames - 1)]


def _buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """The number of the embedding of each distance, key minus query.

    The upper half is for keys after the query. In a half the first buckets hold one distance each, the others widths
    that grow with the logarithm up to ``max_distance``; the last holds all beyond.
    """
    half = buckets // 2
    exact = half // 2
    magnitude = distances.abs()
    log = torch.log(magnitude.float() / exact) / math.log(max_distance / exact)
    wide = (exact + log * (half - exact)).clamp(max=half - 1).long()
    return half * (distances > 0) + torch.where(magnitude < exact, magnitude, wide)
