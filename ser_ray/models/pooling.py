"""From frames to one vector per utterance: masked statistics, and moments that give those of any layer mix.

All in fp32, whatever dtype the frames have: a deviation is a small difference of large numbers.

Shapes: hidden_BFD, mask_BF, weights_BF; B utterances, F frames, D width, S states (layers), M = S + S (S + 1) / 2.
"""

from __future__ import annotations

import torch
from torch import nn

from ser_ray.models.precision import in_fp32


@in_fp32
def normalise(hidden_BFD: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the width of every frame; nothing is trainable here."""
    return nn.functional.layer_norm(hidden_BFD, hidden_BFD.shape[-1:])


@in_fp32
def masked_statistics(hidden_BFD: torch.Tensor, mask_BF: torch.Tensor, deviation: bool = True) -> torch.Tensor:
    """Mean over real frames, and with ``deviation`` the standard deviation appended: (B, D) or (B, 2 D)."""
    weights_BF = mask_BF / mask_BF.sum(-1, keepdim=True)
    if deviation:
        return weighted_statistics(hidden_BFD, weights_BF)
    return torch.einsum("bf,bfd->bd", weights_BF, hidden_BFD)


@in_fp32
def weighted_statistics(hidden_BFD: torch.Tensor, weights_BF: torch.Tensor) -> torch.Tensor:
    """Weighted mean and standard deviation over frames (arXiv 1803.10963, equations 5 and 6): (B, 2 D)."""
    mean_BD = torch.einsum("bf,bfd->bd", weights_BF, hidden_BFD)
    square_BD = torch.einsum("bf,bfd->bd", weights_BF, (hidden_BFD - mean_BD[:, None]).square())
    return torch.cat([mean_BD, (square_BD + 1e-6).sqrt()], dim=-1)


@in_fp32
def moments(hiddens: list[torch.Tensor], mask_BF: torch.Tensor, covariances: bool) -> torch.Tensor:
    """Means over real frames of the normalised states, then their covariances, a row per pair: (B, M, D)."""
    normed_BFSD = torch.stack([normalise(hidden) for hidden in hiddens], dim=2)
    weights_BF = mask_BF / mask_BF.sum(-1, keepdim=True)
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
def pool_moments(moments_BMD: torch.Tensor, mix_S: torch.Tensor, deviation: bool) -> torch.Tensor:
    """Mean, and with ``deviation`` standard deviation, over frames of the states mixed with ``mix_S``: (B, P)."""
    states = len(mix_S)
    mean_BD = torch.einsum("bsd,s->bd", moments_BMD[:, :states], mix_S)
    if not deviation:
        return mean_BD
    one, other = torch.triu_indices(states, states, device=mix_S.device)
    # A pair of different states occurs twice in the square of the sum.
    weight_P = mix_S[one] * mix_S[other] * torch.where(one == other, 1.0, 2.0)
    variance_BD = torch.einsum("bpd,p->bd", moments_BMD[:, states:], weight_P)
    return torch.cat([mean_BD, (variance_BD.clamp(min=0) + 1e-6).sqrt()], dim=-1)
