"""One optimiser step, of one or several batches on each of one or several processes; only this file defines its loss.

The loss of a step is the sum of class weight times loss (`ser_ray.training.losses`) over the utterances of all its
batches and all processes, divided by the average sum of class weights of a step: that of train over the number of
steps. So an utterance has the weight of its class, whatever its length, its neighbours, and how train is divided into
batches and steps. Divided by the sum of the step's own class weights, an utterance would weigh more in a step with
fewer of them: batches are packed by seconds, so long utterances would count more than short ones, and in steps of one
utterance class weights would cancel. If an epoch is one step, both are the weighted mean over train.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ser_ray.config import Experiment
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast
from ser_ray.models.voice import Voice
from ser_ray.speech.stream import Batch
from ser_ray.training import losses


def distribute(model: EmotionClassifier) -> nn.Module:
    """The model to call in training: compiled if its experiment says so; with several processes its gradients are
    averaged over them.

    Its buffers are the same in all processes, so they are not broadcast: those of `SpeakerNorm` change between epochs,
    and are computed from what all processes have gathered.
    """
    if model.experiment.compile:
        model.backbone.compile_blocks()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return model
    device = next(model.head.parameters()).device
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def weighted_loss(
    logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_K: torch.Tensor, loss: losses.Loss
) -> torch.Tensor:
    """The sum of class weight times loss over a batch, in fp32."""
    return (weights_K[labels_B] * loss(logits_BK.float(), labels_B)).sum()


def add_gradients(
    model: nn.Module,
    batch: Batch,
    weights_K: torch.Tensor,
    share: float,
    scaler: torch.amp.GradScaler,
    experiment: Experiment,
    last: bool,
    voices: Voice | None = None,
    loss_of: losses.Loss | None = None,
) -> torch.Tensor:
    """Forward and backward of one batch; returns its `weighted_loss`, detached. Nothing here waits for a GPU.

    ``voices``: what the model knows of each utterance's speaker; a constant for the gradient.
    ``loss_of``: the loss of this batch, if not that of the experiment alone (`ser_ray.training.teacher`).
    ``share``: one over the average sum of class weights of a step in the epoch; 0 for a batch of another process, which
    this one runs only because gradients are summed over all. ``last``: whether it is this process's last batch of the
    step. Processes synchronise there, once per step, whatever the number of batches each has.
    """
    processes = dist.get_world_size() if isinstance(model, DistributedDataParallel) else 1
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
    with alone:
        with autocast(experiment.precision, batch.inputs.device):
            logits_BK = model(batch.inputs, batch.lengths_B, batch.padded, voices)
        loss = weighted_loss(logits_BK, batch.labels_B, weights_K, loss_of or losses.of(experiment.loss))
        # Gradients must be summed over processes, but DistributedDataParallel averages them.
        scaler.scale(loss * (share * processes)).backward()
    return loss.detach()


def apply(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, experiment: Experiment, rate: float) -> None:
    """Clip the accumulated gradients and take a step, at ``rate`` times the base learning rates.

    Gradients are left in place, for the check after the first step.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], experiment.optimizer.clip)
    scaler.step(optimizer)
    scaler.update()
