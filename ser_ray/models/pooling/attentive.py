"""Mean and standard deviation with trainable weights of frames (Okabe et al. 2018, arXiv 1803.10963)."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

from ser_ray.models.pooling import Pooling, weighted_statistics

HIDDEN: Final = 128
"""Width of the layer that scores frames: a few per cent of what a backbone's layer computes for a frame."""


class AttentivePooling(Pooling):
    """Frames are weighted by the softmax over frames of ``score``. It needs every frame, so it has no moments."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.output_width = 2 * width
        self.score = nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1, bias=False))
        nn.init.zeros_(self.score[2].get_parameter("weight"))  # uniform weights at first: plain statistics

    def forward(self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
        scores_BF = self.score(hidden_BFD)[..., 0].masked_fill(~mask_BF, -torch.inf)
        return weighted_statistics(hidden_BFD, scores_BF.softmax(-1))
