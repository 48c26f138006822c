"""Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 4): -(1 - p)^gamma log p, of the probability p that the model
gives to the utterance's emotion.

With gamma 0 this is cross-entropy. An utterance that is classified well counts for less, by a factor of 100 at p = 0.9,
so that training goes to the difficult ones. The paper's factor alpha is the class weight, which is applied elsewhere.
"""

from __future__ import annotations

from typing import Final

import torch

from ser_ray.training.losses.cross_entropy import cross_entropy

GAMMA: Final = 2.0
"""The best in the paper (table 1b), which finds little difference between 0.5 and 5."""


def focal(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """-(1 - p_B)^gamma log p_B."""
    log_p_B = -cross_entropy(logits_BK, labels_B)
    return -((-torch.expm1(log_p_B)) ** GAMMA) * log_p_B  # expm1: 1 - p without cancellation where p is near 1
