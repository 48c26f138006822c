"""Layer mix -> masked pooling -> classifier. With a statistics pooling and no hidden layer, a linear probe's shape."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from ser_ray import config
from ser_ray.config import Experiment
from ser_ray.models import pooling
from ser_ray.models.heads import Head
from ser_ray.models.pooling import normalise
from ser_ray.models.precision import in_fp32
from ser_ray.speech.cached_features import Moments

OWN_NAME: Final = "pooling.score."
WRITTEN_NAME: Final = "score."
"""Of the weights of attentive pooling in a file: as version 0.1.0 wrote them, whose head had no module ``pooling``."""


class PooledHead(Head):
    """The head that the section `head` of the configuration describes."""

    can_start_from_probe = True

    center_P: torch.Tensor
    scale_P: torch.Tensor

    def __init__(self, experiment: Experiment, num_layers: int, width: int) -> None:
        super().__init__(experiment, num_layers, width)
        head, num_emotions = experiment.head, len(experiment.emotions)
        self.layer_mix = head.layer_mix
        self.states = 1 if head.layer_mix == "last" else num_layers + 1
        self.mix_L = nn.Parameter(
            torch.full((self.states,), 1.0 / self.states), requires_grad=head.layer_mix == "weighted"
        )
        self.pooling = pooling.of(head.pooling)(width)
        pooled = self.pooling.output_width * (self.states if head.layer_mix == "concat" else 1)
        self.embedding_width = pooled
        # Standardises the pooled vector; identity unless the probe sets it.
        self.register_buffer("center_P", torch.zeros(pooled))
        self.register_buffer("scale_P", torch.ones(pooled))
        layers: list[nn.Module] = [nn.Dropout(head.dropout)]
        if head.hidden:
            layers += [nn.Linear(pooled, head.hidden), nn.GELU(), nn.Dropout(head.dropout)]
        self.classifier = nn.Sequential(*layers, nn.Linear(head.hidden or pooled, num_emotions))
        self.register_state_dict_post_hook(_with_written_names)
        self.register_load_state_dict_pre_hook(_with_own_names)

    @in_fp32
    def embed(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> torch.Tensor:
        if self.layer_mix == "concat":
            return torch.cat(self.pool_layers(hiddens, mask_BF), dim=-1)
        pooled_BP: torch.Tensor = self.pooling(self.mix(hiddens), mask_BF)
        return pooled_BP

    @in_fp32
    def classify(self, pooled_BP: torch.Tensor) -> torch.Tensor:
        logits_BK: torch.Tensor = self.classifier((pooled_BP - self.center_P) / self.scale_P)
        return logits_BK

    def mix(self, hiddens: list[torch.Tensor]) -> torch.Tensor:
        """A trainable weighted sum of the layers. Every frame is normalised first, since norms grow with depth."""
        if self.layer_mix == "last":
            return normalise(hiddens[-1])
        mixed = normalise(hiddens[0], self.mix_L[0])
        for weight, hidden_BFD in zip(self.mix_L[1 : len(hiddens)], hiddens[1:], strict=True):
            mixed = mixed + normalise(hidden_BFD, weight)
        return mixed

    def highest_state(self) -> int | None:
        if self.layer_mix != "weighted":
            return None
        return max(self.mix_L.nonzero().flatten().tolist(), default=0)

    @classmethod
    def moments(cls, settings: config.Head) -> Moments | None:
        return pooling.of(settings.pooling).moments

    @in_fp32
    def embed_moments(self, moments_BMD: torch.Tensor) -> torch.Tensor:
        if self.layer_mix == "concat":
            return torch.cat(self.pool_layers_of_moments(moments_BMD), dim=-1)
        return self.pooling.from_moments(moments_BMD, self.mix_L)

    @in_fp32
    def pool_layers(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor) -> list[torch.Tensor]:
        return [self.pooling(normalise(hidden_BFD), mask_BF) for hidden_BFD in hiddens]

    @in_fp32
    def pool_layers_of_moments(self, moments_BMD: torch.Tensor) -> list[torch.Tensor]:
        alone = torch.eye(self.states, device=moments_BMD.device)
        return [self.pooling.from_moments(moments_BMD, mix_S) for mix_S in alone]

    @torch.no_grad()
    def start_from_probe(
        self, layer: int, center_P: torch.Tensor, scale_P: torch.Tensor, weight_KP: torch.Tensor, bias_K: torch.Tensor
    ) -> None:
        linear = self.classifier[-1]
        assert isinstance(linear, nn.Linear)
        if self.layer_mix == "weighted":
            self.mix_L.zero_()[layer] = 1.0
        self.center_P.copy_(center_P)
        self.scale_P.copy_(scale_P)
        linear.weight.copy_(weight_KP)
        linear.bias.copy_(bias_K)


# -- below: how it is done


def _with_written_names(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix + OWN_NAME, prefix + WRITTEN_NAME)


def _with_own_names(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(state, prefix + WRITTEN_NAME, prefix + OWN_NAME)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
