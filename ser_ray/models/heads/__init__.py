"""From the hidden states of a backbone to logits: what a head is. Each has a file of its own in this folder.

To add one, write a `Head` in a new file and name it in `ser_ray.config.choices.HEADS`; then ``head.kind`` may be its
name. It is configured by the keys of the section ``head``, of which it may ignore some.

Shapes: hidden_BFD, mask_BF, pooled_BP, logits_BK; B utterances, F frames, D width, P width of the vector that
`Head.embed` returns, K emotions, S states.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import ClassVar

import torch
from torch import nn

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.config.choices import HEADS
from ser_ray.models.precision import in_fp32
from ser_ray.models.voice import SpeakerNorm, Voice
from ser_ray.schema import UserError
from ser_ray.speech.cached_features import Moments


class Head(nn.Module):
    """Hidden states -> one vector per utterance (`embed`) -> logits (`classify`); between the two, what is known of the
    speaker is subtracted from the vector (`relative`), if `config.Head.speaker` says so.

    A head must define these two, set `embedding_width`, and use all of its trainable weights. Both run in fp32: mark
    them with `in_fp32`, and `ser_ray.models.pooling.normalise` the states, which are in the precision of the backbone.
    Its state dict is head.safetensors of a checkpoint. Whatever else is here is optional.
    """

    can_start_from_probe: ClassVar[bool] = False
    """Whether ``head.init: probe`` is possible: `pool_layers` and `start_from_probe` are defined."""

    embedding_width: int
    """P."""
    speaker: SpeakerNorm | None
    """Set by `make` where ``head.speaker`` is not none."""

    def __init__(self, experiment: Experiment, num_layers: int, width: int) -> None:
        """``num_layers`` (the states are one more) and ``width`` (D) are those of the backbone."""
        super().__init__()
        self.speaker = None

    @in_fp32
    def forward(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor, voices: Voice | None = None) -> torch.Tensor:
        """Hidden states, frame mask (B, F) and what is known of the speakers -> logits_BK."""
        return self.classify(self.relative(self.embed(hiddens, mask_BF), voices))

    def relative(self, pooled_BP: torch.Tensor, voices: Voice | None = None) -> torch.Tensor:
        """What `embed` returns -> what `classify` takes: the same without `config.Head.speaker`, else in relation to
        the speakers' ``voices``; None if nothing is known of them."""
        if self.speaker is None:
            return pooled_BP
        relative_BP: torch.Tensor = self.speaker(pooled_BP, voices)
        return relative_BP

    def embed(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> torch.Tensor:
        """Hidden states, each (B, F, D), and frame mask (B, F) -> pooled_BP.

        There are ``num_layers + 1`` states: the input of the first block, and the output of every block. With
        ``head.layer_mix: last`` only the last one is sure to be there, as the others are not cached.
        """
        raise NotImplementedError

    def highest_state(self) -> int | None:
        """The last of the states that an answer depends on, by the weights as they are: `embed` takes no more than
        those up to it. None: all."""
        return None

    def classify(self, pooled_BP: torch.Tensor) -> torch.Tensor:
        """What `relative` returns -> logits_BK."""
        raise NotImplementedError

    @classmethod
    def moments(cls, settings: config.Head) -> Moments | None:
        """What is cached of a frozen backbone; see `Pooling.moments`. If it is not None, which is all frames, the head
        has `embed_moments`."""
        return None

    def embed_moments(self, moments_BMD: torch.Tensor) -> torch.Tensor:
        """Moments of the states (`ser_ray.models.moments`) -> pooled_BP."""
        raise NotImplementedError

    def pool_layers(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> list[torch.Tensor]:
        """A vector of every state by itself, each (B, P): the input of a probe of that layer."""
        raise NotImplementedError

    def pool_layers_of_moments(self, moments_BMD: torch.Tensor) -> list[torch.Tensor]:
        """The same from moments."""
        raise NotImplementedError

    def start_from_probe(
        self, layer: int, center_P: torch.Tensor, scale_P: torch.Tensor, weight_KP: torch.Tensor, bias_K: torch.Tensor
    ) -> None:
        """Become the probe of ``layer`` (0 with ``head.layer_mix: concat``: of all side by side), whose logits are
        ``weight_KP @ ((pooled_P - center_P) / scale_P) + bias_K``."""
        raise NotImplementedError


def of(settings: config.Head) -> type[Head]:
    """The head of that kind. Raises UserError if it is to start from a probe and cannot."""
    kind: type[Head] = resolve_name(HEADS[settings.kind])
    if settings.init == "probe" and not kind.can_start_from_probe:
        raise UserError(f"head.init: probe: head.kind {settings.kind} cannot start from a probe; set it to random")
    return kind


def make(experiment: Experiment, num_layers: int, width: int) -> Head:
    """The head of an experiment over a backbone of so many layers and that width. Raises UserError as `of`."""
    head = of(experiment.head)(experiment, num_layers, width)
    if experiment.head.speaker != "none":
        head.speaker = SpeakerNorm(experiment.head, head.embedding_width)
    return head
