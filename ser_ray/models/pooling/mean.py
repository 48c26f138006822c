"""Mean over real frames."""

from __future__ import annotations

import torch

from ser_ray.models.moments import mixed_mean
from ser_ray.models.pooling import Pooling, uniform_weights
from ser_ray.models.precision import in_fp32


class MeanPooling(Pooling):
    """`masked_mean`."""

    moments = "mean"

    def forward(self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
        return masked_mean(hidden_BFD, mask_BF)

    def from_moments(self, moments_BMD: torch.Tensor, mix_S: torch.Tensor) -> torch.Tensor:
        return mixed_mean(moments_BMD, mix_S)


@in_fp32
def masked_mean(hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """Mean over real frames: (B, D)."""
    return torch.einsum("bf,bfd->bd", uniform_weights(mask_BF), hidden_BFD)
