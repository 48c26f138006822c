"""The emotion classifier: a backbone and a head.

Shapes: waveform_BT, hidden_BFD, mask_BF, pooled_BP, logits_BK; B utterances, T samples, F frames, D width, P width of
the pooled vector, K emotions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models import backbones, heads
from ser_ray.models.adapters import FEED_FORWARD, adapt, attach, targets_of_0_1
from ser_ray.models.backbones import Backbone
from ser_ray.models.prefix import unpack
from ser_ray.models.voice import Voice
from ser_ray.speech.cached_features import Prefix

if TYPE_CHECKING:
    from peft import PeftModel


class EmotionClassifier(nn.Module):
    """Backbone and head; `peft` is PEFT's view of the same backbone where there are low-rank updates."""

    def __init__(self, experiment: Experiment, backbone: Backbone, peft: PeftModel | None) -> None:
        super().__init__()
        self.experiment = experiment
        self.backbone = backbone
        self.head = heads.make(experiment, backbone.num_layers, backbone.width)
        self.prefix: Prefix | None = None
        """Set while the model's inputs are cached features in place of waveforms."""
        self.temperature = 1.0
        """What every logit is divided by for a probability; `ser_ray.evaluation.calibration` fits it."""
        self.least_probability: float | None = None
        """Of an emotion in a set (`ser_ray.evaluation.sets`), at this temperature; None if it was not fitted."""
        self.stop: int | None = None
        """Of a checkpoint: blocks from here on are not run, as the head gives them no weight. None runs all."""
        object.__setattr__(self, "peft", peft)  # not a submodule: its weights are the backbone's

    peft: PeftModel | None

    def forward(
        self, inputs: torch.Tensor, lengths_B: torch.Tensor, padded: bool = True, voices: Voice | None = None
    ) -> torch.Tensor:
        """Waveforms (B, T) at 16 kHz, zero beyond ``lengths_B`` samples, or cached features -> logits_BK.

        ``padded``: whether the lengths may differ; see `Batch.padded`. ``voices``: what is known of each utterance's
        speaker; only for a head that uses it.
        """
        if self._sees_moments():
            return self.head.classify(self.head.relative(self.head.embed_moments(inputs), voices))
        hiddens, mask_BF = self.hidden_states(inputs, lengths_B, padded)
        logits_BK: torch.Tensor = self.head(hiddens, mask_BF, voices)
        return logits_BK

    def probabilities(self, logits_BK: torch.Tensor) -> torch.Tensor:
        """(B, K) float64: what the logits stand for, calibrated."""
        return (logits_BK.double() / self.temperature).softmax(-1)

    def pooled(self, inputs: torch.Tensor, lengths_B: torch.Tensor, padded: bool = True) -> torch.Tensor:
        """The same inputs -> pooled_BP: what a voice is made of, and what `Head.relative` takes."""
        if self._sees_moments():
            return self.head.embed_moments(inputs)
        return self.head.embed(*self.hidden_states(inputs, lengths_B, padded))

    def hidden_states(
        self, inputs: torch.Tensor, lengths_B: torch.Tensor, padded: bool = True
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The states that the head mixes, each (B, F, D), and mask_BF."""
        if self.prefix is None:
            hiddens, mask_BF = self.backbone(inputs, lengths_B, stop=self.stop, padded=padded)
            return hiddens, mask_BF
        (*below, hidden_BFD), mask_BF = unpack(inputs, lengths_B)
        above = self.backbone.blocks(hidden_BFD, mask_BF, start=self.prefix.first_layer, padded=padded)
        return below + above, mask_BF

    def pooled_layers(self, inputs: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """Every layer pooled by itself, each (B, P): the input of a probe of that layer."""
        if self._sees_moments():
            return self.head.pool_layers_of_moments(inputs)
        return self.head.pool_layers(*self.hidden_states(inputs, lengths_B))

    def _sees_moments(self) -> bool:
        return self.prefix is not None and self.prefix.moments is not None


def build(
    experiment: Experiment,
    device: torch.device | str = "cpu",
    adapter: Path | None = None,
    backbone_from: str | None = None,
) -> EmotionClassifier:
    """The classifier that an experiment describes, before training.

    Initial weights of head and adapter depend on ``experiment.seed`` alone. ``adapter``: directory of a saved one
    to start from instead of a new one. ``backbone_from``: where to read the backbone, if not by its name.
    Raises UserError if backbone, adapter or head do not fit; see `backbones.load`, `adapters.adapt` and `heads.of`.
    """
    name, settings = backbone_from or experiment.backbone, experiment.adapter
    whole: tuple[str, ...] = ()
    if adapter and targets_of_0_1(adapter, settings, name):
        settings = settings.model_copy(update={"targets": FEED_FORWARD["wavlm"]})
        whole = (r".*\.attention",)
    backbone = backbones.load(name, settings.method == "qlora", device, experiment.precision, whole)
    # Written to adapter_config.json as the base model: the name that others know, wherever it was read.
    backbone.model.name_or_path = experiment.backbone
    backbone.masks = (experiment.augment.channel_mask, experiment.augment.time_mask)
    backbone.recompute = experiment.recompute
    with torch.random.fork_rng():
        torch.manual_seed(experiment.seed)
        peft = attach(backbone, adapter, settings) if adapter else adapt(backbone, settings)
        model = EmotionClassifier(experiment, backbone, peft)
    return model.to(device)
