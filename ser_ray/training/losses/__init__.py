"""The loss of an utterance. Each has a file of its own in this folder.

To add one, write a function like `Loss` in a new file and name it in `ser_ray.config.choices.LOSSES`; then
``experiment.loss`` may be its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name

import torch

from ser_ray.config.choices import LOSSES

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""logits_BK in fp32 and labels_B (indices of emotions) -> one loss per utterance, (B,).

No class weights, no sum and no mean: `ser_ray.training.step` applies them. A loss depends on its own utterance alone,
so that it is the same however utterances are divided into batches and processes."""


def of(name: str) -> Loss:
    """The loss of that name."""
    found: Loss = resolve_name(LOSSES[name])
    return found
