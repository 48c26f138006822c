"""The emotion classifier: backbone -> layer mix -> masked pooling -> classifier.

Shapes: waveform_BT, hidden_BFD, mask_BF, pooled_BP, logits_BK; B utterances, T samples, F frames, D width,
P = D (mean) or 2 D (mean and standard deviation), K emotions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ser_ray.config import Experiment
from ser_ray.models import backbones
from ser_ray.models.adapters import adapt, attach
from ser_ray.models.backbones import Backbone
from ser_ray.models.pooling import masked_statistics, normalise, pool_moments, weighted_statistics
from ser_ray.models.precision import in_fp32
from ser_ray.models.prefix import unpack
from ser_ray.speech.cached_features import Prefix

if TYPE_CHECKING:
    from peft import PeftModel


class Head(nn.Module):
    """Hidden states of all layers -> logits, in fp32; what `head` in the configuration describes."""

    center_P: torch.Tensor
    scale_P: torch.Tensor

    def __init__(self, experiment: Experiment, num_layers: int, width: int) -> None:
        super().__init__()
        head, num_emotions = experiment.head, len(experiment.emotions)
        self.layer_mix, self.pooling = head.layer_mix, head.pooling
        self.states = 1 if head.layer_mix == "last" else num_layers + 1
        self.mix_L = nn.Parameter(
            torch.full((self.states,), 1.0 / self.states), requires_grad=head.layer_mix == "weighted"
        )
        pooled = width if head.pooling == "mean" else 2 * width
        pooled *= self.states if head.layer_mix == "concat" else 1
        if head.pooling == "attentive":
            self.score = nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1, bias=False))
            nn.init.zeros_(self.score[2].get_parameter("weight"))  # uniform attention at first: plain statistics
        # Standardises the pooled vector; identity unless the probe sets it.
        self.register_buffer("center_P", torch.zeros(pooled))
        self.register_buffer("scale_P", torch.ones(pooled))
        layers: list[nn.Module] = [nn.Dropout(head.dropout)]
        if head.hidden:
            layers += [nn.Linear(pooled, head.hidden), nn.GELU(), nn.Dropout(head.dropout)]
        self.classifier = nn.Sequential(*layers, nn.Linear(head.hidden or pooled, num_emotions))

    @in_fp32
    def forward(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> torch.Tensor:
        """Hidden states (L + 1 of (B, F, D)) and frame mask (B, F) -> logits_BK."""
        return self.classify(self.embed(hiddens, mask_BF))

    @in_fp32
    def embed(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> torch.Tensor:
        """The same input -> one vector per utterance (B, P), which `classify` takes."""
        if self.layer_mix == "concat":
            return torch.cat([self.pool(normalise(hidden), mask_BF) for hidden in hiddens], dim=-1)
        return self.pool(self.mix(hiddens), mask_BF)

    @in_fp32
    def classify(self, pooled_BP: torch.Tensor) -> torch.Tensor:
        """One vector per utterance -> logits_BK."""
        logits_BK: torch.Tensor = self.classifier((pooled_BP - self.center_P) / self.scale_P)
        return logits_BK

    def mix(self, hiddens: list[torch.Tensor]) -> torch.Tensor:
        """A trainable weighted sum of the layers. Every frame is normalised first, since norms grow with depth."""
        if self.layer_mix == "last":
            return normalise(hiddens[-1])
        mixed = normalise(hiddens[0]) * self.mix_L[0]
        for weight, hidden_BFD in zip(self.mix_L[1:], hiddens[1:], strict=True):
            mixed = mixed + normalise(hidden_BFD) * weight
        return mixed

    def pool(self, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor) -> torch.Tensor:
        """Frames -> one vector per utterance, over real frames only."""
        if self.pooling != "attentive":
            return masked_statistics(hidden_BFD, mask_BF, deviation=self.pooling == "statistics")
        scores_BF = self.score(hidden_BFD)[..., 0].masked_fill(~mask_BF, -torch.inf)
        return weighted_statistics(hidden_BFD, scores_BF.softmax(-1))


class EmotionClassifier(nn.Module):
    """Backbone and head; `peft` is PEFT's view of the same backbone where there are low-rank updates."""

    def __init__(self, experiment: Experiment, backbone: Backbone, peft: PeftModel | None) -> None:
        super().__init__()
        self.experiment = experiment
        self.backbone = backbone
        self.head = Head(experiment, backbone.num_layers, backbone.width)
        self.prefix: Prefix | None = None
        """Set while the model's inputs are cached features in place of waveforms."""
        object.__setattr__(self, "peft", peft)  # not a submodule: its weights are the backbone's

    peft: PeftModel | None

    def forward(self, inputs: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, T) at 16 kHz, zero beyond ``lengths_B`` samples, or cached features -> logits_BK."""
        if self.prefix is not None and self.prefix.moments:
            if self.head.layer_mix == "concat":
                return self.head.classify(torch.cat(self.pooled_layers(inputs, lengths_B), dim=-1))
            pooled_BP = pool_moments(inputs, self.head.mix_L, self.head.pooling == "statistics")
            return self.head.classify(pooled_BP)
        hiddens, mask_BF = self.hidden_states(inputs, lengths_B)
        logits_BK: torch.Tensor = self.head(hiddens, mask_BF)
        return logits_BK

    def hidden_states(self, inputs: torch.Tensor, lengths_B: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The states that the head mixes, each (B, F, D), and mask_BF."""
        if self.prefix is None:
            hiddens, mask_BF = self.backbone(inputs, lengths_B)
            return hiddens, mask_BF
        (*below, hidden_BFD), mask_BF = unpack(inputs, lengths_B)
        return below + self.backbone.blocks(hidden_BFD, mask_BF, start=self.prefix.first_layer), mask_BF

    def pooled_layers(self, inputs: torch.Tensor, lengths_B: torch.Tensor) -> list[torch.Tensor]:
        """Plain statistics over the frames of every layer, each (B, P): the input of a probe of that layer."""
        deviation = self.head.pooling != "mean"
        if self.prefix is not None and self.prefix.moments:
            return [pool_moments(inputs, one, deviation) for one in torch.eye(self.head.states, device=inputs.device)]
        hiddens, mask_BF = self.hidden_states(inputs, lengths_B)
        return [masked_statistics(normalise(hidden), mask_BF, deviation) for hidden in hiddens]


def build(experiment: Experiment, device: torch.device | str = "cpu", adapter: str | None = None) -> EmotionClassifier:
    """The classifier that an experiment describes, before training.

    Initial weights of head and adapter depend on ``experiment.seed`` alone. ``adapter``: directory of a saved one
    to start from instead of a new one.
    Raises UserError if backbone or adapter do not fit; see `backbones.load` and `adapters.adapt`.
    """
    quantize = experiment.adapter.method == "qlora"
    backbone = backbones.load(experiment.backbone, quantize, device, experiment.precision)
    backbone.masks = (experiment.augment.channel_mask, experiment.augment.time_mask)
    backbone.recompute = experiment.recompute
    with torch.random.fork_rng():
        torch.manual_seed(experiment.seed)
        peft = attach(backbone, adapter, experiment.adapter) if adapter else adapt(backbone, experiment.adapter)
        model = EmotionClassifier(experiment, backbone, peft)
    return model.to(device)
