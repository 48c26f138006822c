"""What a model costs where it is used: its size, and the time of an utterance."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import parameters_in
from ser_ray.speech.stream import Batch
from ser_ray.training.loop import predict_batches


@dataclass(frozen=True)
class Cost:
    """Of a whole model: its backbone and its head."""

    parameters: int
    megabytes: float
    """Of its weights as they are in memory, in 10^6 bytes; those of NF4 take 4 bits and their scales."""
    milliseconds: float
    """Of an utterance: the median over those that were measured."""
    utterances: int
    """How many were measured."""


def cost_of(model: EmotionClassifier, alone: Iterable[Batch]) -> Cost:
    """Parameters, size and time of a model; ``alone``: batches of one utterance, read before the time is measured."""
    seconds: list[float] = []
    for number, batch in enumerate(alone):
        for _ in range(1 if number else 2):  # the first run of a model is slower, and is not counted
            started = time.perf_counter()
            for _, logits_BK in predict_batches(model, [batch]):
                logits_BK.cpu()
            elapsed = time.perf_counter() - started
        seconds.append(elapsed)
    parameters = sum(map(parameters_in, model.parameters()))
    return Cost(parameters, _bytes(model) / 1e6, 1000 * float(np.median(seconds)), len(seconds))


# -- below: how it is done


def _bytes(model: torch.nn.Module) -> int:
    held = [*model.parameters(), *model.buffers()]
    scales = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    held += [state.absmax for state in scales if state is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
