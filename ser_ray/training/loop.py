"""Fit one model: epochs of optimiser steps, dev figures after each, early stopping, resumable to the same numbers.

No Ray in here. Data comes as functions that give an epoch's batches; what happens goes out through one callback;
with several processes torch.distributed must be set up (Ray Train does, so does torchrun). Everything random is
seeded by (seed, epoch, rank), and the learning rate is a function of the step, so a run that continues from a
checkpoint takes the steps that the unbroken one would have taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ser_ray.config import Experiment
from ser_ray.evaluation import metrics
from ser_ray.models import checkpoint
from ser_ray.models.adapters import check_gradients
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.precision import autocast, compute_dtype
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch
from ser_ray.training.probe import start_from_probe

Record = dict[str, Any]
Save = Callable[[Path], None]


@dataclass(frozen=True)
class Data:
    """What a model is fitted to. ``train(epoch)`` and ``dev()`` give this process's batches."""

    train: Callable[[int], Iterable[Batch]]
    dev: Callable[[], Iterable[Batch]]
    steps_per_epoch: int
    """Batches of one epoch, as planned; sets the pace of warm-up and decay."""
    train_counts: tuple[int, ...]
    """Utterances of every emotion in train, over all processes."""


def fit(
    model: EmotionClassifier,
    data: Data,
    on_epoch: Callable[[Record, Save], None],
    metric: str = "dev_uar",
    resume_from: Path | None = None,
) -> None:
    """Train ``model`` in place as ``model.experiment`` says.

    ``on_epoch(record, save)`` is called after every epoch, on every process: ``record`` is a line of the history
    (dev figures, loss, rate, seconds, ...), ``save(directory)`` writes a checkpoint that ``resume_from`` takes.
    ``metric`` is what early stopping goes by. With ``head.init: probe`` the untrained probe is reported as epoch 0.

    Raises UserError where the loss is not finite, or an adapter does not learn.
    """
    experiment, device = model.experiment, _device(model)
    optimizer = make_optimizer(model)
    counters: dict[str, Any] = {"epoch": 0, "step": 0, "best": -1.0, "best_epoch": 0}
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(experiment.precision, device) is torch.float16)
    if resume_from is not None:
        checkpoint.load_weights(model, resume_from)
        counters = checkpoint.load_training_state(resume_from, optimizer)
        scaler.load_state_dict(counters["scaler"])
    elif experiment.head.init == "probe":
        start_from_probe(model, data.train(0), data.dev(), gather)
    trained = _distribute(model, device)
    criterion = nn.CrossEntropyLoss(weight=class_weights(experiment, data.train_counts).to(device))

    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def goes_on(epoch: int) -> bool:
        return epoch <= experiment.epochs and epoch - counters["best_epoch"] <= experiment.patience

    def finish(record: Record) -> None:
        record |= evaluate(model, data.dev(), criterion)
        counters["epoch"] = record["epoch"]
        if record[metric] > counters["best"]:
            counters.update(best=record[metric], best_epoch=record["epoch"])
        record |= {f"best_{metric}": counters["best"], "best_epoch": counters["best_epoch"]}
        record |= {"last": not goes_on(record["epoch"] + 1), "trainable_parameters": learning}
        tell(record)

    def tell(record: Record) -> None:
        def save(directory: Path) -> None:
            checkpoint.save_training_state(directory, optimizer, counters | {"scaler": scaler.state_dict()})
            checkpoint.save(model, directory, record)

        on_epoch(record, save)

    if resume_from is not None and not goes_on(counters["epoch"] + 1):
        # Nothing is left to train, but whoever watched the last epoch may have died before it heard.
        tell(json.loads((resume_from / "metrics.json").read_text(encoding="utf-8")))
    if resume_from is None and experiment.head.init == "probe":
        finish({"epoch": 0, "train_loss": None, "seconds": 0.0} | _memory(device))
    while goes_on(counters["epoch"] + 1):
        finish(_train_epoch(model, trained, data, counters["epoch"] + 1, counters, optimizer, scaler, criterion))


def _train_epoch(
    model: EmotionClassifier,
    trained: nn.Module,
    data: Data,
    epoch: int,
    counters: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    criterion: nn.Module,
) -> Record:
    experiment, device = model.experiment, _device(model)
    torch.manual_seed(hash((experiment.seed, epoch, _rank())) % 2**63)
    model.train()
    started, waited, seen = time.perf_counter(), 0.0, 0
    losses: list[torch.Tensor] = []
    total_steps = -(-data.steps_per_epoch // experiment.optimizer.accumulate) * experiment.epochs
    for number, (batch, more, wait) in enumerate(_together(data.train(epoch), device), start=1):
        waited += wait
        step_now = number % experiment.optimizer.accumulate == 0 or not more
        rate = learning_rate_factor(counters["step"], total_steps, experiment.optimizer.warmup)
        loss = train_step(trained, batch, criterion, optimizer, scaler, experiment, rate, step_now)
        if counters["step"] == 0 and step_now:
            check_gradients(model)
        if step_now:
            optimizer.zero_grad(set_to_none=True)
            counters["step"] += 1
        losses.append(loss)
        seen += len(batch)
    own_loss = float(torch.stack(losses).mean()) if losses else float("nan")  # a GPU has done all steps by now
    seconds = time.perf_counter() - started
    # Of all processes, which took as many steps each: one that diverges stops all of them.
    every = gather((seen, own_loss))
    seen, mean_loss = sum(n for n, _ in every), sum(loss for _, loss in every) / len(every)
    if not np.isfinite(mean_loss):
        raise UserError(
            f"epoch {epoch}: the training loss is {mean_loss}; lower optimizer.lr ({experiment.optimizer.lr:g})"
            if losses
            else f"epoch {epoch}: no training batch reached this worker; use fewer workers"
        )
    rate = learning_rate_factor(counters["step"], total_steps, experiment.optimizer.warmup)
    return {
        "epoch": epoch,
        "train_loss": mean_loss,
        "lr": experiment.optimizer.lr * rate,
        "seconds": seconds,
        "utterances_per_s": seen / seconds,
        "input_wait": waited / seconds,
    } | _memory(device)


def train_step(
    model: nn.Module,
    batch: Batch,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    experiment: Experiment,
    rate: float,
    step_now: bool,
) -> torch.Tensor:
    """Forward and backward of one batch, and with ``step_now`` an optimiser step at ``rate`` times the base rates.

    Gradients are left in place, for the check after the first step. Returns the loss, detached.
    """
    with autocast(experiment.precision, batch.inputs.device):
        logits_BK = model(batch.inputs, batch.lengths_B)
    loss: torch.Tensor = criterion(logits_BK, batch.labels_B)
    scaler.scale(loss / experiment.optimizer.accumulate).backward()
    if step_now:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], experiment.optimizer.clip)
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


@torch.inference_mode()
def predict_batches(model: EmotionClassifier, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch (moved to the model's device) with its logits_BK, in evaluation mode and training's precision."""
    model.eval()
    device = _device(model)
    for batch in batches:
        batch = batch.to(device)
        with autocast(model.experiment.precision, device):
            yield batch, model(batch.inputs, batch.lengths_B)


def evaluate(model: EmotionClassifier, batches: Iterable[Batch], criterion: nn.Module) -> Record:
    """Dev figures over all processes: each predicts the batches that it is given, all compute the same figures."""
    losses, labels, predicted = [], [], []
    for batch, logits_BK in predict_batches(model, batches):
        losses.append((float(criterion(logits_BK, batch.labels_B)), len(batch)))
        labels.append(batch.labels_B.cpu().numpy())
        predicted.append(logits_BK.argmax(-1).cpu().numpy())
    every = [pair for part in gather((losses, labels, predicted)) for pair in zip(*part, strict=True)]
    confusion = metrics.confusion(
        np.concatenate([label for _, label, _ in every]),
        np.concatenate([guess for _, _, guess in every]),
        len(model.experiment.emotions),
    )
    total = sum(n for (_, n), _, _ in every)
    figures = {f"dev_{name}": float(value) for name, value in metrics.headline(confusion).items()}
    return {"dev_loss": sum(loss * n for (loss, n), _, _ in every) / total} | figures


def make_optimizer(model: EmotionClassifier) -> torch.optim.AdamW:
    """AdamW; the head at its own rate, no decay on vectors (biases, norms, layer mix)."""
    settings = model.experiment.optimizer
    groups = []
    for part, rate in ((model.backbone, settings.lr), (model.head, settings.head_lr)):
        learning = [p for p in part.parameters() if p.requires_grad]
        for decay, members in (
            (settings.weight_decay, [p for p in learning if p.ndim > 1]),
            (0.0, [p for p in learning if p.ndim <= 1]),
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
    """(K,) loss weights: with ``balanced`` N / (K n_k), 1 for an emotion that train has none of; else ones."""
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


def _together(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, bool, float]]:
    """Batches on the device, whether another follows, and the seconds waited; ranks stop at the same step.

    Batches are packed by seconds, so ranks may hold different numbers of them: the surplus of an epoch (less than
    one batch in a few) is left out, for no rank may wait for gradients that never come.
    """
    source = iter(batches)

    def pull() -> tuple[Batch | None, float]:
        start = time.perf_counter()
        batch = next(source, None)
        wait = time.perf_counter() - start
        if _distributed():
            have = torch.tensor(int(batch is not None), device=device)
            dist.all_reduce(have, dist.ReduceOp.MIN)
            batch = batch if int(have) else None
        return batch, wait

    batch, wait = pull()
    while batch is not None:
        following, next_wait = pull()
        yield batch.to(device), following is not None, wait
        batch, wait = following, next_wait
    for _ in source:  # the surplus must be read: Ray Data's split waits for every reader
        pass


def _distribute(model: EmotionClassifier, device: torch.device) -> nn.Module:
    if not _distributed():
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def forget_peak() -> None:
    """Peak memory is counted from here; where the system keeps no such count, from the start of the process.

    What is free goes back to the system before: each trial of a process has a thread of its own, and glibc keeps what
    every one of them has freed, 240 MB a trial of the demo (results/LOG.md).
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


def _device(model: EmotionClassifier) -> torch.device:
    return next(model.head.parameters()).device


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0
