"""Cross-entropy: -log p, of the probability p that the model gives to the utterance's emotion."""

from __future__ import annotations

import torch
from torch import nn


def cross_entropy(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """-log p_B."""
    return nn.functional.cross_entropy(logits_BK, labels_B, reduction="none")
