"""Fit one model: epochs of optimiser steps, dev metrics after each, early stopping, exact resumption.

No Ray in here. Functions give the batches of an epoch, and one callback receives the results. With several processes
torch.distributed must be initialised (Ray Train and torchrun do so). Everything random is seeded by (seed, epoch,
rank), and the learning rate is a function of the step, so a run that continues from a checkpoint takes the same steps
as an uninterrupted one. The batches of an epoch are known before it starts (`ser_ray.speech.order`), and so is the
number of steps of the whole run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ser_ray.config import Experiment
from ser_ray.evaluation import metrics
from ser_ray.models import checkpoint
from ser_ray.models.adapters import check_gradients
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast, compute_dtype
from ser_ray.models.voice import Voice
from ser_ray.schema import UserError
from ser_ray.speech import order
from ser_ray.speech.stream import Batch
from ser_ray.training import step
from ser_ray.training.losses.cross_entropy import cross_entropy
from ser_ray.training.probe import start_from_probe
from ser_ray.training.speakers import TrainVoices
from ser_ray.training.teacher import Teacher

Record = dict[str, Any]
Save = Callable[[Path], None]


@dataclass(frozen=True)
class Data:
    """The data that a model is fitted to."""

    train: Callable[[int], Iterable[Batch]]
    """Epoch -> the batches that this process runs, in the order of its steps (`order.steps`). In epoch 0, which is for
    the probe and for the voices of speakers, each batch is run by one process only."""
    dev: Callable[[], Iterable[Batch]]
    """This process's share of dev."""
    counts: Callable[[int], np.ndarray]
    """Epoch -> (B, K): number of utterances of every emotion in every batch, over all processes, in their order."""
    speakers: Mapping[str, str] = field(default_factory=dict)
    """Utterance id -> speaker, for all of train; needed for `config.Head.speaker`."""
    teacher: Teacher | None = None
    """What a student is trained on beside the labels."""


def fit(
    model: EmotionClassifier,
    data: Data,
    on_epoch: Callable[[Record, Save], None],
    metric: str = "dev_uar",
    resume_from: Path | None = None,
) -> None:
    """Train ``model`` in place as ``model.experiment`` says.

    ``on_epoch(record, save)`` is called after every epoch, on every process: ``record`` is a line of the history
    (dev metrics, loss, rate, seconds, ...), ``save(directory)`` writes a checkpoint for ``resume_from``. ``metric``
    decides on early stopping. With ``head.init: probe`` the probe before fine-tuning is reported as epoch 0.

    Raises UserError if the loss is not finite, or a trainable weight gets no gradient.
    """
    experiment, device = model.experiment, _device(model)
    optimizer = make_optimizer(model)
    counters: dict[str, Any] = {"epoch": 0, "step": 0, "best": -1.0, "best_epoch": 0}
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(experiment.precision, device) is torch.float16)
    if resume_from is not None:
        counters = _resume(model, optimizer, scaler, resume_from)
    elif experiment.head.init == "probe":
        start_from_probe(model, data.train(0), data.dev(), gather, data.speakers)
    trained = step.distribute(model)
    voices = TrainVoices(model, lambda: data.train(0), data.speakers, gather)
    train_counts_K = torch.from_numpy(data.counts(1).sum(axis=0)).to(device)
    weights_K = class_weights(experiment, tuple(train_counts_K.tolist())).to(device)
    steps_of = [len(_steps(experiment, data.counts(epoch))) for epoch in range(1, experiment.epochs + 1)]
    total_steps = sum(steps_of)
    # Steps of the current schedule: with other workers or batches than before, an epoch has other numbers of steps.
    counters["step"] = sum(steps_of[: counters["epoch"]])

    def should_continue(epoch: int) -> bool:
        return epoch <= experiment.epochs and epoch - counters["best_epoch"] <= experiment.patience

    def finish(record: Record) -> None:
        voices.update(record["epoch"])
        record |= evaluate(model, data.dev(), weights_K, train_counts_K > 0)
        counters["epoch"] = record["epoch"]
        if record[metric] > counters["best"]:
            counters.update(best=record[metric], best_epoch=record["epoch"])
        record |= {f"best_{metric}": counters["best"], "best_epoch": counters["best_epoch"]}
        record |= {"last": not should_continue(record["epoch"] + 1), "trainable_parameters": _trainable(model)}
        report(record)

    def report(record: Record) -> None:
        def save(directory: Path) -> None:
            checkpoint.save_training_state(directory, optimizer, counters | {"scaler": scaler.state_dict()})
            checkpoint.save(model, directory, record)

        on_epoch(record, save)

    if resume_from is not None and not should_continue(counters["epoch"] + 1):
        # Nothing is left to train, but the driver may have died before it received the last epoch's record.
        report(json.loads((resume_from / "metrics.json").read_text(encoding="utf-8")))
    if resume_from is None and experiment.head.init == "probe":
        finish({"epoch": 0, "train_loss": None, "seconds": 0.0} | _memory(device))
    while should_continue(counters["epoch"] + 1):
        epoch = counters["epoch"] + 1
        finish(_train_epoch(model, trained, data, epoch, counters, total_steps, optimizer, scaler, weights_K, voices))


def _resume(
    model: EmotionClassifier, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, directory: Path
) -> dict[str, Any]:
    """Continue from a checkpoint; returns its counters. Raises UserError for one that is damaged."""
    checkpoint.load_weights(model, directory)
    counters = checkpoint.load_training_state(directory, optimizer)
    whole = all(type(counters.get(name)) is int and counters[name] >= 0 for name in ("epoch", "best_epoch"))
    if not whole or type(counters.get("best")) is not float or not isinstance(counters.get("scaler"), dict):
        raise UserError(f"{directory}: training/state.json is not the state of a training; it cannot be resumed from")
    if counters["scaler"]:  # empty if the run used another precision until now, such as on a CPU
        scaler.load_state_dict(counters["scaler"])
    return counters


def _train_epoch(
    model: EmotionClassifier,
    trained: nn.Module,
    data: Data,
    epoch: int,
    counters: dict[str, Any],
    total_steps: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    weights_K: torch.Tensor,
    voices: TrainVoices,
) -> Record:
    experiment, device = model.experiment, _device(model)
    voices.update(epoch - 1)
    torch.manual_seed(hash((experiment.seed, epoch, _rank())) % 2**63)
    model.train()
    counts_BK = data.counts(epoch)
    steps = _steps(experiment, counts_BK)
    train_weight = float(counts_BK.sum(axis=0) @ weights_K.double().cpu().numpy())  # sum of class weights over train
    arriving = _Arriving(data.train(epoch), device)
    started, seen, own_losses = time.perf_counter(), 0, []
    for taken in steps:
        for number in taken.read:
            batch, last = next(arriving), number == taken.read[-1]
            assert len(batch) == counts_BK[number].sum(), f"epoch {epoch}: batch {number} is not the planned one"
            share = len(steps) / train_weight if taken.own else 0.0
            known = voices.drawn(batch.utterance_ids, epoch)
            taught = data.teacher.loss(batch.utterance_ids) if data.teacher else None
            loss = step.add_gradients(trained, batch, weights_K, share, scaler, experiment, last, known, taught)
            if taken.own:
                own_losses.append(loss)
                seen += len(batch)
        rate = learning_rate_factor(counters["step"], total_steps, experiment.optimizer.warmup)
        step.apply(optimizer, scaler, experiment, rate)
        if counters["step"] == 0:
            check_gradients(model)
        optimizer.zero_grad(set_to_none=True)
        counters["step"] += 1
    own_loss = float(torch.stack(own_losses).double().sum()) if own_losses else 0.0  # waits for the GPU
    seconds = time.perf_counter() - started
    # Over all processes: if one diverges, all stop.
    every = gather((seen, own_loss))
    seen, mean_loss = sum(n for n, _ in every), sum(loss for _, loss in every) / train_weight
    if not np.isfinite(mean_loss):
        raise UserError(
            f"epoch {epoch}: the training loss is {mean_loss}; lower optimizer.lr ({experiment.optimizer.lr:g})"
        )
    rate = learning_rate_factor(counters["step"], total_steps, experiment.optimizer.warmup)
    return {
        "epoch": epoch,
        "train_loss": mean_loss,
        "lr": experiment.optimizer.lr * rate,
        "seconds": seconds,
        "utterances_per_s": seen / seconds,
        "input_wait": arriving.waited / seconds,
    } | _memory(device)


@torch.inference_mode()
def predict_batches(
    model: EmotionClassifier, batches: Iterable[Batch], voice: Voice | None = None
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch (on the model's device) with its logits_BK, in evaluation mode and training's precision.

    ``voice``: what is known of the one speaker of all of them.
    """
    model.eval()
    device = _device(model)
    for batch in batches:
        batch = batch.to(device)
        with autocast(model.experiment.precision, device):
            yield batch, model(batch.inputs, batch.lengths_B, batch.padded, voice and voice.at([0] * len(batch)))


def evaluate(
    model: EmotionClassifier, batches: Iterable[Batch], weights_K: torch.Tensor, trained_K: torch.Tensor
) -> Record:
    """Dev metrics over all processes: each predicts its own batches, and all compute the same metrics.

    The loss is cross-entropy with the class weights of training, over all of dev at once; it is not `Experiment.loss`,
    so that trials whose losses differ can be compared. ``trained_K`` (bool) marks the emotions that occur in train.
    The others (those that the corpora of `cross_corpus` do not share) are never predicted and not scored, as on test.
    """
    losses, labels, predicted = [], [], []
    for batch, logits_BK in predict_batches(model, batches):  # read after the loop, so as not to wait for the GPU
        losses.append(step.weighted_loss(logits_BK, batch.labels_B, weights_K, cross_entropy))
        labels.append(batch.labels_B)
        predicted.append(logits_BK.masked_fill(~trained_K, -torch.inf).argmax(-1))
    own = [torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.int64) for parts in (labels, predicted)]
    own_loss = float(torch.stack(losses).double().sum()) if losses else 0.0
    every = gather((own_loss, *own))
    label_N, guess_N = (np.concatenate([part[i] for part in every]) for i in (1, 2))
    confusion = metrics.confusion(label_N, guess_N, len(model.experiment.emotions))
    counted = np.flatnonzero(trained_K.cpu().numpy())
    confusion = confusion[np.ix_(counted, counted)]
    dev_weight = weights_K.double().cpu().numpy()[label_N].sum()
    dev_metrics = {f"dev_{name}": float(value) for name, value in metrics.headline(confusion).items()}
    return {"dev_loss": sum(loss for loss, *_ in every) / float(dev_weight)} | dev_metrics


def make_optimizer(model: EmotionClassifier) -> torch.optim.AdamW:
    """AdamW; the head has its own learning rate, and so has B in LoRA+. Vectors (biases, norms, layer mix, DoRA's
    magnitudes) have no weight decay."""
    settings, adapter = model.experiment.optimizer, model.experiment.adapter
    of_backbone = [(adapter.variant == "loraplus" and ".lora_B." in n, p) for n, p in model.backbone.named_parameters()]
    parts = (
        ([p for faster, p in of_backbone if not faster], settings.lr),
        ([p for faster, p in of_backbone if faster], settings.lr * adapter.loraplus_ratio),
        (list(model.head.parameters()), settings.head_lr),
    )
    groups = []
    for parameters, rate in parts:
        trainable = [p for p in parameters if p.requires_grad]
        for decay, members in (
            (settings.weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if members:
                groups.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, fused=_device(model).type == "cuda")


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over the first ``warmup`` share of ``total`` steps, then linear decay towards 0.

    >>> [round(learning_rate_factor(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.125, 0.0]
    """
    rising = max(1, round(total * warmup)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total - step) / max(1, total - rising))


def class_weights(experiment: Experiment, counts: tuple[int, ...]) -> torch.Tensor:
    """(K,) loss weights: with ``balanced`` N / (P n_k) for the P emotions that occur in train, else 1."""
    counts_K = torch.tensor(counts, dtype=torch.float32)
    if experiment.class_weights == "none":
        return torch.ones_like(counts_K)
    present = int((counts_K > 0).sum())
    return torch.where(counts_K > 0, counts_K.sum() / (present * counts_K.clamp(min=1)), 1.0)


def gather(value: Any) -> list[Any]:
    """Every process's value, in order of rank."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# -- below: how it is done


class _Arriving:
    """Moves batches to the device, and counts the seconds spent waiting for them."""

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self.batches, self.device, self.waited = iter(batches), device, 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        return batch.to(self.device)


def _steps(experiment: Experiment, counts_BK: np.ndarray) -> list[order.Step]:
    """This process's steps of an epoch."""
    return order.steps(
        len(counts_BK), experiment.optimizer.accumulate, _rank(), dist.get_world_size() if _distributed() else 1
    )


def forget_peak() -> None:
    """Reset the peak memory; where the system cannot do so, the peak is that since the start of the process.

    Before that, free memory is returned to the system: each trial of a process has a thread of its own, and glibc
    retains what every thread has freed, 240 MB per trial of the demo (results/LOG.md).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux, or a container that forbids it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the resident set's peak


def _memory(device: torch.device) -> Record:
    if device.type == "cuda":
        return {"peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def _trainable(model: EmotionClassifier) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _device(model: EmotionClassifier) -> torch.device:
    return next(model.head.parameters()).device


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
