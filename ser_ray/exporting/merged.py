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
from ser_ray.models import backbones, checkpoint, ensemble, variants
from ser_ray.models.backbones import Backbone
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.ensemble import Model, members_of

BASES: Final = {ORIGINAL: "the original weights of its backbone", QUANTISED: "the weights that 4 bits hold"}


def reference(directory: Path, backbone: str | None = None) -> Model:
    """The checkpoint as `ser-ray predict` answers with it on a CPU, in fp32 whatever it was trained in; where it was
    trained over weights in 4 bits, these are in 4 bits here too."""
    return ensemble.load(directory, "cpu", backbone, precision="fp32")


def is_quantised(model: Model) -> bool:
    """Whether updates were trained over weights in 4 bits, be it of one member."""
    return any(member.experiment.adapter.method == "qlora" for member in members_of(model))


def bases(model: Model) -> tuple[str, ...]:
    """What the updates of a checkpoint may be added to, the preferred first.

    Those of loftq start from what 4 bits changed in the weights: on the original ones they would correct it twice.
    """
    if not is_quantised(model):
        return (ORIGINAL,)
    of_loftq = any(member.experiment.adapter.variant == "loftq" for member in members_of(model))
    return (QUANTISED,) if of_loftq else (ORIGINAL, QUANTISED)


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


def all_merged(directory: Path, options: Options) -> Model:
    """`merged` for a checkpoint, and for every member of an ensemble. Members over the same frozen backbone share it,
    as its weights are the same."""
    shared: dict[str, Backbone] = {}

    def load_one(one: Path) -> EmotionClassifier:
        model = merged(one, options)
        if model.experiment.adapter.method == "frozen":
            model.backbone = shared.setdefault(model.experiment.backbone, model.backbone)
        return model

    return ensemble.assembled(directory, load_one)


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
    quantised = checkpoint.load(directory, "cpu", options.backbone, precision="fp32").backbone.model
    variants.copy_dequantised(quantised, encoder)
