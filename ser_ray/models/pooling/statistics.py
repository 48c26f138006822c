"""Mean and standard deviation over real frames.

In fp32 whatever dtype the frames have: a deviation is a small difference of large numbers.
"""

from __future__ import annotations

import torch

from ser_ray.models.moments import mixed_statistics
from ser_ray.models.pooling import Pooling, uniform_weights, weighted_statistics
from ser_ray.models.precision import in_fp32


class StatisticsPooling(Pooling):
    """`masked_statistics`."""

    moments = "statistics"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.output_width = 2 * width

    def forward(self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
        return masked_statistics(hidden_BFD, mask_BF)

    def from_moments(self, moments_BMD: torch.Tensor, mix_S: torch.Tensor) -> torch.Tensor:
        return mixed_statistics(moments_BMD, mix_S)


@in_fp32
def masked_statistics(hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation over real frames: (B, 2 D)."""
    return weighted_statistics(hidden_BFD, uniform_weights(mask_BF))
