"""Moments of hidden states over frames: they give the statistics of any layer mix, without the frames.

Shapes: hidden_BFD, moments_BMD; B utterances, F frames, D width, S states (layers). M = S for means alone, and
S + S (S + 1) / 2 with covariances, a row per pair of states. In fp32, whatever dtype the states have.
"""

from __future__ import annotations

import torch

from ser_ray.models.pooling import normalise, uniform_weights
from ser_ray.models.precision import in_fp32


@in_fp32
def moments(hiddens: list[torch.Tensor], mask_BF: torch.Tensor, covariances: bool) -> torch.Tensor:
    """Means over real frames of the normalised states, then their covariances: (B, M, D)."""
    normed_BFSD = torch.stack([normalise(hidden) for hidden in hiddens], dim=2)
    weights_BF = uniform_weights(mask_BF)
    mean_BSD = torch.einsum("bf,bfsd->bsd", weights_BF, normed_BFSD)
    if not covariances:
        return mean_BSD
    centred_BFSD = normed_BFSD - mean_BSD[:, None]
    upper = torch.triu_indices(len(hiddens), len(hiddens)).tolist()
    pairs = [
        torch.einsum("bf,bfd,bfd->bd", weights_BF, centred_BFSD[:, :, one], centred_BFSD[:, :, other])
        for one, other in zip(*upper, strict=True)
    ]
    return torch.cat([mean_BSD, torch.stack(pairs, dim=1)], dim=1)


@in_fp32
def mixed_mean(moments_BMD: torch.Tensor, mix_S: torch.Tensor) -> torch.Tensor:
    """Mean over frames of the states mixed with ``mix_S``: (B, D)."""
    return torch.einsum("bsd,s->bd", moments_BMD[:, : len(mix_S)], mix_S)


@in_fp32
def mixed_statistics(moments_BMD: torch.Tensor, mix_S: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation over frames of the states mixed with ``mix_S``: (B, 2 D)."""
    states = len(mix_S)
    one, other = torch.triu_indices(states, states, device=mix_S.device)
    # A pair of different states occurs twice in the square of the sum.
    weight_P = mix_S[one] * mix_S[other] * torch.where(one == other, 1.0, 2.0)
    variance_BD = torch.einsum("bpd,p->bd", moments_BMD[:, states:], weight_P)
    return torch.cat([mixed_mean(moments_BMD, mix_S), (variance_BD.clamp(min=0) + 1e-6).sqrt()], dim=-1)
