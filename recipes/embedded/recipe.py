"""Train an embedded backbone: generate the speech, train on it, write the backbone's directory.

    python -m recipes.embedded.recipe OUT --family whisper --speech DIR

Everything is generated here: no external data or weights are used. The same command continues an interrupted training
and gives the same weights as an uninterrupted one; on another machine they differ by its arithmetic. ``--export``
writes OUT from the last saved step.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.embedded import material, objectives, speech
from recipes.embedded.objectives import WEIGHTS, Objectives, total
from ser_ray.disk import read_json, replacing, write_json, write_text
from ser_ray.models import backbones, pretraining
from ser_ray.models.precision import autocast
from ser_ray.schema import UserError

ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "whisper": {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "num_mel_bins": 80,
        "d_model": 192,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 576,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 576,
        "max_source_positions": 1500,
        "vocab_size": 51864,
        "dropout": 0.0,
    },
    "wav2vec2": {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2Model"],
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 576,
        # A first stride of 10 samples, not 5: the convolutions near the waveform are most of the cost.
        "conv_dim": [64, 96, 128, 128, 192, 192],
        "conv_kernel": [20, 3, 3, 3, 3, 2],
        "conv_stride": [10, 2, 2, 2, 2, 2],
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 32,
        "num_conv_pos_embedding_groups": 8,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "vocab_size": 32,
    },
}
"""Family -> its ``config.json``. No dropout: such a small network does not overfit speech that varies endlessly."""
EXTRACTORS: Final[dict[str, dict[str, Any]]] = {
    "whisper": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 80,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "padding_value": 0.0,
        "return_attention_mask": False,
    },
    "wav2vec2": {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16000,
        "do_normalize": False,  # loudness carries emotion
        "padding_value": 0.0,
        "return_attention_mask": True,
    },
}
"""Family -> its ``preprocessor_config.json``."""
WARM_UP: Final = 300
"""Steps in which the learning rate rises; it then falls along half a cosine to zero."""
SAVE_EVERY: Final = 250
"""Steps between saves, at most lost by a kill."""
CLIP: Final = 1.0
"""Largest norm of the gradient."""


@dataclass(frozen=True)
class Recipe:
    """All that the weights depend on, except the machine."""

    family: str
    hours: float
    steps: int
    batch: int
    rate: float
    objectives: tuple[str, ...]
    masks: tuple[float, float]
    seed: int


class Training:
    """A backbone with its heads and optimiser, at some step; `save` and `load` use safetensors alone.

    The architecture is written to ``directory``.
    """

    def __init__(self, recipe: Recipe, directory: Path, device: str) -> None:
        self.recipe = recipe
        self.device = device
        _write_architecture(recipe.family, directory)
        self.backbone = backbones.untrained(str(directory), recipe.seed).to(device)
        self.backbone.masks = recipe.masks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.heads = Objectives(recipe.objectives, self.backbone.width).to(device)
        self.learned = [p for p in [*self.backbone.parameters(), *self.heads.parameters()] if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.learned, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0
        self.losses: dict[str, float] = {}
        """Exponential means over about the last hundred steps."""

    def update(self, batch: material.Batch) -> None:
        """One step. Its randomness (masks, dropout) depends on the seed and its number alone."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate * rate_at(self.step, self.recipe.steps)
        self.backbone.train()
        self.heads.train()
        batch = batch.to(self.device)
        with autocast("bf16" if self.device == "cuda" else "fp32", self.device):
            hiddens, mask_BF = self.backbone(batch.waveform_BT, batch.lengths_B)
            losses = self.heads(hiddens, mask_BF, batch)
        self.optimiser.zero_grad()
        total(losses).backward()
        nn.utils.clip_grad_norm_(self.learned, CLIP)
        self.optimiser.step()
        self.step += 1
        for name, loss in losses.items():
            value = float(loss.detach())
            self.losses[name] = value if name not in self.losses else 0.99 * self.losses[name] + 0.01 * value

    def save(self, path: Path) -> None:
        """Write one file, atomically, so that weights and step are always of the same save."""
        tensors = {f"backbone.{key}": value for key, value in self.backbone.state_dict().items()}
        tensors |= {f"heads.{key}": value for key, value in self.heads.state_dict().items()}
        for place, parameter in enumerate(self.learned):
            state = self.optimiser.state[parameter]
            tensors |= {f"adam.{place}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        notes = {"step": str(self.step), **{f"loss.{name}": repr(loss) for name, loss in self.losses.items()}}
        with replacing(path) as aside:
            save_file({key: value.contiguous() for key, value in tensors.items()}, aside, metadata=notes)

    def load(self, path: Path) -> None:
        """Read what `save` wrote for the same recipe."""
        tensors = load_file(path, device=self.device)
        self.backbone.load_state_dict(_below(tensors, "backbone."))
        self.heads.load_state_dict(_below(tensors, "heads."))
        for place, parameter in enumerate(self.learned):
            self.optimiser.state[parameter] = _below(tensors, f"adam.{place}.")
        notes = saved_notes(path)
        self.step = int(notes.pop("step"))
        self.losses = {name.removeprefix("loss."): float(loss) for name, loss in notes.items()}


def saved_notes(path: Path) -> dict[str, str]:
    """The step and the losses that a file of `Training.save` contains, as text."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rate_at(step: int, steps: int) -> float:
    """The learning rate as a share of the largest.

    >>> [round(rate_at(step, 1300), 2) for step in (0, 299, 800, 1299)]
    [0.0, 1.0, 0.5, 0.0]
    """
    warm_up = min(WARM_UP, steps // 4)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def run(recipe: Recipe, out: Path, spoken: Path, console: Console, device: str, workers: int, export: bool) -> None:
    """Generate the missing speech, train from the last saved step, write ``out``; see the module's docstring.

    Raises UserError where the training beside ``out`` is of another recipe, or ``spoken`` of other settings.
    """
    aside = out.with_name(f"{out.name}.training")
    _claim(aside, recipe)
    speech.make(
        spoken, recipe.hours, recipe.seed, max(1, workers), lambda done, of: console.print(f"speech: {done} of {of}")
    )
    training, latest = Training(recipe, aside, device), aside / "latest.safetensors"
    if latest.is_file():
        training.load(latest)
        console.print(f"continuing from step {training.step}")
    if not export:
        _train(training, spoken, latest, console, workers)
    write(training, out)
    console.print(f"written to {out}")


def write(training: Training, out: Path) -> None:
    """Write the backbone alone: fp16 weights, the files of its architecture, its recipe, and its data."""
    prefix = "encoder." if training.recipe.family == "whisper" else ""  # where AutoModel looks for them
    state = training.backbone.model.state_dict()
    weights = {prefix + key: value.half().cpu().contiguous() for key, value in state.items()}
    fresh = out.with_name(f".{out.name}.aside")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    _write_architecture(training.recipe.family, fresh)
    digest = hashlib.sha256((fresh / "model.safetensors").read_bytes()).hexdigest()
    write_json(fresh / "recipe.json", _told(training) | {"sha256": digest})
    write_json(fresh / pretraining.FILE, speech.pretrained_on(training.recipe.seed))
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main(arguments: list[str]) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m recipes.embedded.recipe", description="Train a backbone.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--speech", type=Path, required=True, help="directory of the speech; missing parts are made")
    parser.add_argument("--hours", type=float, default=8, help="of speech; every step augments it anew")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16, help="crops per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--objectives", nargs="+", choices=sorted(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--masks", nargs=2, type=float, default=(0.1, 0.1), help="shares of channels and of frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that prefetch batches")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; results depend on it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--export", action="store_true", help="write OUT from the last saved step, without training")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    recipe = Recipe(
        family=given.family,
        hours=given.hours,
        steps=given.steps,
        batch=given.batch,
        rate=given.rate,
        objectives=tuple(name for name in WEIGHTS if name in given.objectives),
        masks=tuple(given.masks),
        seed=given.seed,
    )
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(recipe, given.out, given.speech, console, given.device, given.workers, given.export)
    except UserError as error:
        print(f"recipe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        return 130
    return 0


# -- below: how it is done


def _write_architecture(family: str, directory: Path) -> None:
    for name, content in (("config", ARCHITECTURES), ("preprocessor_config", EXTRACTORS)):
        write_text(directory / f"{name}.json", json.dumps(content[family], indent=2) + "\n")


def _claim(aside: Path, recipe: Recipe) -> None:
    path = aside / "recipe.json"
    content = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(recipe).items()}
    if path.is_file() and read_json(path) != content:
        raise UserError(
            f"{aside}: holds a training with another recipe ({read_json(path)}); remove it, or choose another OUT"
        )
    aside.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _train(training: Training, spoken: Path, latest: Path, console: Console, workers: int) -> None:
    recipe = training.recipe
    steps = range(training.step, recipe.steps)
    started, shown = time.monotonic(), time.monotonic()
    try:
        parts = speech.count_parts(recipe.hours)  # the directory may hold more
        for batch in material.batches(spoken, recipe.seed, recipe.batch, steps, workers, parts):
            training.update(batch)
            if training.step % SAVE_EVERY == 0:
                training.save(latest)
            if (now := time.monotonic()) - shown > 20 or training.step == recipe.steps:
                each = (now - started) / (training.step - steps.start)
                losses = "  ".join(f"{name} {loss:.3f}" for name, loss in training.losses.items())
                left = each * (recipe.steps - training.step) / 60
                console.print(
                    f"step {training.step} of {recipe.steps}  {losses}  {each:.2f} s each, {left:.0f} min left"
                )
                shown = now
    finally:
        if training.step > steps.start:
            training.save(latest)


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _told(training: Training) -> dict[str, Any]:
    packages = ("torch", "transformers", "espeakng-loader", "numpy", "scipy", "soxr")
    return {
        **vars(training.recipe),
        "weights": {name: objectives.WEIGHTS[name] for name in training.recipe.objectives},
        "steps_done": training.step,
        "losses": {name: round(loss, 4) for name, loss in training.losses.items()},
        "drawn": speech.PER_PART
        * speech.count_parts(training.recipe.hours),  # sentences: those of `speech.sentences(seed, drawn)`
        "parameters": sum(p.numel() for p in training.backbone.model.parameters()),
        "threads": torch.get_num_threads(),
        "device": training.device,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
