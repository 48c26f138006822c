"""A checkpoint as exports need it: on the CPU and in fp32, so that what is compared is the export and not rounding."""

from __future__ import annotations

from pathlib import Path

import torch

from ser_ray.models import checkpoint, variants
from ser_ray.models.classifier import EmotionClassifier


def reference(directory: Path, backbone: str | None = None) -> EmotionClassifier:
    """The checkpoint as `ser-ray predict` answers with it on a CPU, in fp32 whatever it was trained in; where it was
    trained over weights in 4 bits (NF4), these are in 4 bits here too."""
    return checkpoint.load(directory, "cpu", backbone, precision="fp32")


@torch.no_grad()
def merged(directory: Path, backbone: str | None = None) -> EmotionClassifier:
    """The checkpoint with plain weights in fp32: low-rank updates are added to those of the original backbone, which
    are not quantised again.

    The updates of loftq are those to the weights in 4 bits, from which they started: they are added to these, as the
    original ones would be corrected twice.
    """
    model = checkpoint.load(directory, "cpu", backbone, precision="fp32", in_4_bits=False)
    if model.peft is None:
        return model
    if model.experiment.adapter.variant == "loftq":
        quantised = reference(directory, backbone).peft
        assert quantised is not None, "loftq is a variant of qlora"
        variants.copy_dequantised(quantised, model.peft)
    model.backbone.model = model.peft.merge_and_unload()
    model.backbone.updates = None
    object.__setattr__(model, "peft", None)  # as it was set
    return model.eval().requires_grad_(False)
