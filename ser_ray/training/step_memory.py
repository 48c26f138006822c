"""The GPU memory that a trial's training takes, measured on two of its steps."""

from __future__ import annotations

from typing import Final

import torch

from ser_ray.config import Experiment
from ser_ray.models.classifier import build
from ser_ray.models.precision import compute_dtype
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech.stream import Batch
from ser_ray.training import loop, step

USUAL_SECONDS: Final = 4.0
"""Length of an utterance of acted speech."""


def step_bytes(experiment: Experiment, device: torch.device) -> int:
    """What torch holds of the GPU at most while it takes steps of `largest_batches`: weights, activations, gradients
    and the optimiser's state.

    Raises an out-of-memory error of torch where they do not fit.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_steps(experiment, device)
    return torch.cuda.max_memory_reserved(device)


def run_steps(experiment: Experiment, device: torch.device) -> None:
    """Train on each of `largest_batches` once, as `loop.fit` does."""
    model = build(experiment, device)
    model.train()
    optimizer = loop.make_optimizer(model)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(experiment.precision, device) is torch.float16)
    weights_K = torch.ones(len(experiment.emotions), device=device)
    for batch in largest_batches(experiment):
        step.add_gradients(model, batch.to(device), weights_K, 1 / len(batch), scaler, experiment, last=True)
        step.apply(optimizer, scaler, experiment, 1.0)
        optimizer.zero_grad(set_to_none=True)


def largest_batches(experiment: Experiment) -> list[Batch]:
    """Batches of silence of the most padded seconds: of utterances of usual length, and of the longest possible.

    Which takes more memory depends on the backbone: the scores of attention grow with the square of the length, but are
    not always held.
    """
    longest = experiment.audio.max_seconds
    return [_batch(experiment, seconds) for seconds in sorted({min(USUAL_SECONDS, longest), longest})]


# -- below: how it is done


def _batch(experiment: Experiment, seconds: float) -> Batch:
    count = max(1, int(experiment.batch_seconds / seconds))
    samples = int(seconds * SAMPLING_RATE)
    ids = tuple(f"synthetic/{number}" for number in range(count))
    lengths_B, labels_B = torch.full((count,), samples), torch.zeros(count, dtype=torch.int64)
    return Batch(ids, torch.zeros(count, samples), lengths_B, labels_B)
