"""From the frames of an utterance to one vector: what a pooling is. Each has a file of its own in this folder.

To add one, write a `Pooling` in a new file and name it in `ser_ray.config.choices.POOLINGS`; then ``head.pooling`` may
be its name.

Shapes: hidden_BFD, mask_BF, pooled_BP; B utterances, F frames, D width, S states (layers), M moments (see
`ser_ray.models.moments`).
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import ClassVar

import torch
from torch import nn

from ser_ray.config.choices import POOLINGS
from ser_ray.models.precision import in_fp32
from ser_ray.speech.cached_features import Moments


class Pooling(nn.Module):
    """Frames -> one vector per utterance.

    The head calls it in fp32, whatever autocast surrounds it, with frames that are normalised (`normalise`). Only real
    frames may count, those where the mask is True; an utterance has at least one. What is behind them is arbitrary.
    """

    moments: ClassVar[Moments | None] = None
    """What is cached of a frozen backbone for this pooling. None: all frames. mean: the mean of every state over the
    frames. statistics: the covariances of the states as well. Of moments a cache is many times smaller, and training
    calls `from_moments` in place of `forward`; only for a pooling that can be computed from them."""

    def __init__(self, width: int) -> None:
        """``width``: D. A pooling whose vectors have another width sets `output_width`."""
        super().__init__()
        self.output_width = width
        """P."""

    def forward(self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
        """Frames (B, F, D) and mask (B, F) -> pooled_BP."""
        raise NotImplementedError

    def from_moments(self, moments_BMD: torch.Tensor, mix_S: torch.Tensor) -> torch.Tensor:
        """The same from the moments of S states, of the frames that are these states mixed with the weights ``mix_S``:
        (B, M, D) and (S,) -> pooled_BP."""
        raise NotImplementedError


def of(name: str) -> type[Pooling]:
    """The pooling of that name."""
    found: type[Pooling] = resolve_name(POOLINGS[name])
    return found


@in_fp32
def normalise(hidden_BFD: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Zero mean and unit variance over the width of every frame, then times ``scale``, which is one number.

    As the norm's own weight it costs neither a kernel nor memory: a product would keep the frames for its gradient.
    """
    width = hidden_BFD.shape[-1:]
    return nn.functional.layer_norm(hidden_BFD, width, None if scale is None else scale.expand(width))


def uniform_weights(mask_BF: torch.Tensor) -> torch.Tensor:
    """The same weight for all real frames of an utterance, with sum 1; 0 for padding."""
    return mask_BF / mask_BF.sum(-1, keepdim=True)


@in_fp32
def weighted_statistics(hidden_BFD: torch.Tensor, weights_BF: torch.Tensor) -> torch.Tensor:
    """Weighted mean and standard deviation over frames (arXiv 1803.10963, equations 5 and 6): (B, 2 D)."""
    mean_BD = torch.einsum("bf,bfd->bd", weights_BF, hidden_BFD)
    square_BD = torch.einsum("bf,bfd->bd", weights_BF, (hidden_BFD - mean_BD[:, None]).square())
    return torch.cat([mean_BD, (square_BD + 1e-6).sqrt()], dim=-1)
