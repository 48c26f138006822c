"""A checkpoint is a directory that another program can read: safetensors, JSON and YAML, never a pickle.

adapter/             low-rank updates in PEFT's layout (lora, qlora)
backbone/            the whole encoder in transformers' layout (full)
head.safetensors     layer mix, pooling, classifier, average speaker
experiment.yaml      the resolved configuration
labels.json          index -> emotion
metrics.json         the metrics when it was written
calibration.json     in best/: the temperature of its probabilities, and the threshold of its sets
training/            optimiser moments and counters, to resume from
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ser_ray import config
from ser_ray.disk import expanded, write_json
from ser_ray.evaluation import calibration
from ser_ray.evaluation.calibration import Calibration
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.models import backbones, variants
from ser_ray.models.adapters import load_updates, save_updates
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.precision import autocast
from ser_ray.models.pretrained import MissingBackboneError
from ser_ray.models.weights import REASON, not_finite, read_object, read_tensors, read_weights
from ser_ray.schema import SAMPLING_RATE, UserError, reason_of

MOST_TEMPERATURE: Final = 1000.0
"""Of a stranger's checkpoint; at a higher one all emotions are equally probable."""


def save(model: EmotionClassifier, directory: Path, metrics: dict[str, Any]) -> None:
    """Write the model into ``directory``; ``metrics.json`` comes last, so a directory that has it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    with _system_errors(directory):
        if model.peft is not None:
            save_updates(model.peft, directory / "adapter")
        elif model.experiment.adapter.method == "full":
            model.backbone.model.save_pretrained(directory / "backbone")
            model.backbone.extractor.save_pretrained(directory / "backbone")
        save_file({k: v.contiguous() for k, v in model.head.state_dict().items()}, directory / "head.safetensors")
    (directory / "experiment.yaml").write_text(config.dump(model.experiment), encoding="utf-8")
    for path in directory.rglob("*.safetensors"):  # safetensors makes them readable by their owner alone
        shutil.copymode(directory / "experiment.yaml", path)
    write_json(directory / "labels.json", dict(enumerate(model.experiment.emotions)))
    write_json(directory / "metrics.json", metrics)


def load(
    directory: str | Path,
    device: torch.device | str = "cpu",
    backbone: str | Path | None = None,
    precision: str | None = None,
    in_4_bits: bool = True,
) -> EmotionClassifier:
    """The model that `save` wrote, in evaluation mode. ``backbone``: where its backbone is now, if that has moved.

    ``precision``: what it computes in, if not in what its experiment says. ``in_4_bits``: whether a backbone that was
    held in 4 bits in training is held so here; without, low-rank updates are over the original weights, as lora.

    A checkpoint may come from a stranger: its code is never run, and all of its weights have to be there and finite.
    Raises UserError if the directory is not a complete checkpoint, or its backbone cannot be found.
    """
    directory = expanded(directory).absolute()  # not to be taken for a hub id
    check_is_one(directory)
    experiment = config.load_experiment(directory / "experiment.yaml")
    experiment = experiment.model_copy(update={"precision": precision or experiment.precision})
    if experiment.adapter.method == "qlora" and not in_4_bits:
        experiment = experiment.model_copy(update={"adapter": experiment.adapter.model_copy(update={"method": "lora"})})
    for name in ("head.safetensors", "metrics.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: {name} is missing; give a complete checkpoint")
    method = experiment.adapter.method
    if method == "full":
        if backbone is not None:
            raise UserError(f"{directory}: it holds its backbone itself, all of it was trained; leave out --backbone")
        backbone = directory / "backbone"
    try:
        adapter = directory / "adapter" if method in ("lora", "qlora") else None
        model = build(experiment, device, adapter, backbone_from=str(backbone) if backbone else None)
    except MissingBackboneError as error:
        hint = "" if method == "full" else "; if it has moved, say where it is now: --backbone DIR"
        raise UserError(f"{directory}: its {error}{hint}") from None
    model.head.load_state_dict(read_weights(directory / "head.safetensors", model.head.state_dict()))
    model.stop = model.head.highest_state()
    known = _calibration(directory)
    model.temperature, model.least_probability = known.temperature, known.least_probability
    _check_runs(model.eval(), directory)
    return model


def check_is_one(directory: Path) -> None:
    """Raises UserError for an ensemble (`ser_ray.models.ensemble`)."""
    if (directory / ENSEMBLE).is_file():
        raise UserError(f"{directory}: an ensemble, which is several models; give one of them: {directory}/members/01")


def save_training_state(directory: Path, optimizer: torch.optim.Optimizer, counters: dict[str, Any]) -> None:
    """Optimiser moments as safetensors and counters as JSON under ``training/``."""
    directory = directory / "training"
    directory.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()["state"]
    moments = {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}
    moments = {key: tensor.detach().cpu().contiguous() for key, tensor in moments.items()}
    with _system_errors(directory):
        save_file(moments, directory / "optimizer.safetensors")
    write_json(directory / "state.json", counters)
    shutil.copymode(directory / "state.json", directory / "optimizer.safetensors")


def load_training_state(directory: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the moments into ``optimizer`` (built over the same parameters) and return the counters.

    Raises UserError where they are missing, damaged, or those of other parameters.
    """
    directory = directory / "training"
    counters = read_object(directory / "state.json")
    path = directory / "optimizer.safetensors"
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, moment in read_tensors(path).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index) if index.isdecimal() else -1, {})[name] = moment
    _check_moments(path, state, optimizer)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return counters


def load_weights(model: EmotionClassifier, directory: Path) -> None:
    """Load a checkpoint's trained weights into a model that was built from the same experiment."""
    model.head.load_state_dict(read_weights(directory / "head.safetensors", model.head.state_dict()))
    if model.peft is not None:
        variants.restore(model.peft)
        load_updates(model.peft, directory / "adapter")
    elif model.experiment.adapter.method == "full":
        device = next(model.head.parameters()).device
        weights = backbones.load(str(directory.absolute() / "backbone"), device=device)
        model.backbone.model.load_state_dict(weights.model.state_dict())


def _calibration(directory: Path) -> Calibration:
    """What the answers of a checkpoint are calibrated by; of one without such a file, nothing."""
    path = directory / calibration.FILE
    if not path.is_file():
        return Calibration()
    return calibration_in(read_object(path), path)


def calibration_in(content: Mapping[str, Any], path: Path) -> Calibration:
    """The calibration in a stranger's JSON. Raises UserError for one that divides by nothing, or by no number."""
    temperature, least = _number(content.get("temperature")), content.get("least_probability")
    if not 0 < temperature < MOST_TEMPERATURE:
        raise UserError(f"{path}: temperature has to be a number above 0; without this file there is none")
    if least is not None and not 0 <= _number(least) <= 1:
        raise UserError(f"{path}: least_probability has to be between 0 and 1, or null")
    return Calibration(temperature, None if least is None else float(least))


def _number(value: Any) -> float:
    """NaN for what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if number else math.nan


def _check_moments(
    path: Path, state: Mapping[int, Mapping[str, torch.Tensor]], optimizer: torch.optim.Optimizer
) -> None:
    """Raises UserError for moments that are not finite, or not those of an optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {name for moments in state.values() for name in moments}
    for index, moments in state.items():
        fits = 0 <= index < len(parameters) and moments.keys() == names
        if not fits or any(m.numel() > 1 and m.shape != parameters[index].shape for m in moments.values()):
            raise UserError(f"{path}: it holds the moments of other parameters; it cannot be resumed from")
        if damaged := not_finite(moments.items()):
            raise UserError(f"{path}: {index}.{damaged} has values that are not finite; it cannot be resumed from")


def _check_runs(model: EmotionClassifier, directory: Path) -> None:
    """Raises UserError where a model does not predict half a second of sound: its files may agree with each other and
    still describe nothing that runs, such as convolutions without a stride."""
    device = next(model.head.parameters()).device
    waveform_BT = 0.1 * torch.sin(torch.arange(SAMPLING_RATE // 2, device=device) / 10)[None]
    try:
        with torch.inference_mode(), autocast(model.experiment.precision, device):
            logits_BK = model(waveform_BT, torch.tensor([waveform_BT.shape[1]], device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a configuration that nobody foresaw makes torch raise
        raise UserError(f"{directory}: its model does not run: {reason_of(error, REASON)}") from None
    if not logits_BK.isfinite().all():
        raise UserError(f"{directory}: what its model predicts is not finite: its weights or its backbone are damaged")


@contextmanager
def _system_errors(directory: Path) -> Iterator[None]:
    """Turn a safetensors error that quotes a system error number into OSError: a full disk is one as elsewhere."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from error
