"""A checkpoint as exports need it: on the CPU and in fp32, so that what is compared is the export and not rounding.

Updates that were trained over weights in 4 bits (NF4) may be added to two bases in fp32: the original weights of the
backbone, or the same as 4 bits hold them. The former is what others have; the latter is what was trained and tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import nn

from ser_ray.exporting import ORIGINAL, QUANTISED, Options
from ser_ray.models import backbones, checkpoint, variants
from ser_ray.models.classifier import EmotionClassifier

BASES: Final = {ORIGINAL: "the original weights of its backbone", QUANTISED: "the weights that 4 bits hold"}


def reference(directory: Path, backbone: str | None = None) -> EmotionClassifier:
    """The checkpoint as `ser-ray predict` answers with it on a CPU, in fp32 whatever it was trained in; where it was
    trained over weights in 4 bits, these are in 4 bits here too."""
    return checkpoint.load(directory, "cpu", backbone, precision="fp32")


def bases(model: EmotionClassifier) -> tuple[str, ...]:
    """What the updates of a checkpoint may be added to, the preferred first.

    Those of loftq start from what 4 bits changed in the weights: on the original ones they would correct it twice.
    """
    adapter = model.experiment.adapter
    if adapter.method != "qlora":
        return (ORIGINAL,)
    return (QUANTISED,) if adapter.variant == "loftq" else (ORIGINAL, QUANTISED)


def merged(directory: Path, options: Options) -> EmotionClassifier:
    """The checkpoint with plain weights in fp32: low-rank updates are added to those of ``options.base``."""
    model = checkpoint.load(directory, "cpu", options.backbone, precision="fp32", in_4_bits=False)
    if model.peft is None:
        return model
    if options.base == QUANTISED:
        _dequantise(directory, options, model.backbone.model)
    with torch.no_grad():
        model.backbone.model = model.peft.merge_and_unload()
    model.backbone.updates = None
    object.__setattr__(model, "peft", None)  # as it was set
    return model.eval().requires_grad_(False)


def without_updates(directory: Path, options: Options) -> EmotionClassifier:
    """`merged` but for the updates: what a user of the adapter adds them to."""
    model = merged(directory, options)
    model.backbone.model = backbones.load(options.backbone or model.experiment.backbone).model
    if options.base == QUANTISED:
        _dequantise(directory, options, model.backbone.model)
    return model


# -- below: how it is done


def _dequantise(directory: Path, options: Options, encoder: nn.Module) -> None:
    """Set the weights of an encoder that the checkpoint holds in 4 bits to what these are."""
    quantised = reference(directory, options.backbone).backbone.model
    variants.copy_dequantised(quantised, encoder)
