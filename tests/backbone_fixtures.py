"""Tiny random backbones of every family in transformers' layout, and experiments and audio to go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ser_ray.config import Experiment, to_dict
from ser_ray.models import checkpoint, prefix
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.precision import autocast
from ser_ray.schema import SAMPLING_RATE
from ser_ray.speech import order
from ser_ray.speech.stream import Batch
from ser_ray.training import loop

VARIANTS = (
    "wav2vec2-group",
    "wav2vec2-layer",
    "hubert-group",
    "hubert-noproj",
    "wavlm-group",
    "wavlm-layer",
    "whisper",
)
"""Every front end and norm order that the four families come in; noproj: no norm before the projection."""

FOUR = ("angry", "happy", "sad", "neutral")

WIDTH, LAYERS, FEED_FORWARD = 32, 2, 48

torch.set_num_threads(1)  # threads cost more than they bring at this size


def write_backbone(variant: str, directory: Path) -> Path:
    """Random weights, none of them at a special value (0 or 1), in the layout that the hub has."""
    config, model_class = _describe(variant)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.requires_grad:  # Whisper's sinusoids are given
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    if variant == "whisper":
        transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(directory)
    else:
        normalize = not variant.startswith("hubert")
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(directory)
    return directory


def _describe(variant: str) -> tuple[transformers.PretrainedConfig, type[torch.nn.Module]]:
    family, _, kind = variant.partition("-")
    if family == "whisper":
        config = transformers.WhisperConfig(
            d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=4, encoder_ffn_dim=FEED_FORWARD
        )
        return config, WhisperEncoder
    config_class, model_class = {
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    }[family]
    options = {"feat_proj_layer_norm": kind != "noproj"} if family == "hubert" else {}
    stable = kind in ("layer", "noproj")
    config = config_class(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=FEED_FORWARD,
        conv_dim=[16] * 7,
        conv_bias=stable,
        feat_extract_norm="layer" if stable else "group",
        do_stable_layer_norm=stable,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=32,
        **options,
    )
    return config, model_class


def experiment(
    backbone: Path | str, emotions: Iterable[str] = ("angry", "happy", "sad"), **sections: object
) -> Experiment:
    """An experiment over a backbone; ``sections`` as in YAML."""
    return Experiment.model_validate(
        {"name": "tiny", "corpora": {"synthetic": None}, "emotions": tuple(emotions), "backbone": str(backbone)}
        | sections
    )


def trained(directory: Path, backbone: Path | str, **sections: object) -> Path:
    """A checkpoint in which nothing is at its initial value, so that no part of it can be left out unnoticed."""
    model = build(experiment(backbone, FOUR, **sections))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in model.head.buffers():
            buffer.add_(torch.rand_like(buffer))
    checkpoint.save(model, directory, {"epoch": 1})
    return directory


def noise(seconds: Iterable[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """waveform_BT of speech-like noise (loud and quiet stretches), zero beyond lengths_B."""
    rng = np.random.default_rng(seed)
    lengths = [round(s * SAMPLING_RATE) for s in seconds]
    waveform_BT = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        time = np.arange(length) / SAMPLING_RATE
        envelope = 0.05 + np.sin(2 * np.pi * 2 * time + row) ** 2
        wave = 0.1 * envelope * (rng.standard_normal(length) + np.sin(2 * np.pi * (150 + 70 * row) * time))
        waveform_BT[row, :length] = torch.from_numpy(wave.astype(np.float32))
    return waveform_BT, torch.tensor(lengths)


def noise_batch(seconds: Iterable[float] = (0.5, 0.8, 0.6), seed: int = 0, num_emotions: int = 3) -> Batch:
    """A labelled batch of `noise`."""
    waveform_BT, lengths_B = noise(seconds, seed)
    labels_B = torch.arange(len(lengths_B)) % num_emotions
    return Batch(tuple(f"synthetic/{i}" for i in range(len(lengths_B))), waveform_BT, lengths_B, labels_B)


def tone_batches(
    utterances: int, labels: int, *, batch: int = 6, seed: int = 0, noisiness: float = 0.05
) -> list[Batch]:
    """Something to learn: the label sets the pitch, 0.3 to 0.5 s each."""
    rng = np.random.default_rng(seed)
    batches = []
    for start in range(0, utterances, batch):
        rows = range(start, min(start + batch, utterances))
        lengths = [int(rng.integers(4800, 8000)) for _ in rows]
        waveform_BT = np.zeros((len(lengths), max(lengths)), np.float32)
        for row, (length, index) in enumerate(zip(lengths, rows, strict=True)):
            pitch = 200 * 2 ** (index % labels) * rng.uniform(0.9, 1.1)
            tone = np.sin(2 * np.pi * pitch * np.arange(length) / SAMPLING_RATE + rng.uniform(0, 6))
            waveform_BT[row, :length] = 0.3 * tone + noisiness * rng.standard_normal(length)
        batches.append(
            Batch(
                tuple(f"synthetic/{i}" for i in rows),
                torch.from_numpy(waveform_BT),
                torch.tensor(lengths),
                torch.tensor([i % labels for i in rows]),
            )
        )
    return batches


def data_of(
    epochs: Callable[[int], Sequence[Batch]], dev: Sequence[Batch], accumulate: int = 1, rank: int = 0, size: int = 1
) -> loop.Data:
    """What one of ``size`` processes is fitted to, of epochs that are given as the batches of all processes."""

    def train(epoch: int) -> list[Batch]:
        every = epochs(epoch)
        own = range(rank, len(every), size)
        if epoch:
            own = [b for step in order.steps(len(every), accumulate, rank, size) for b in step.read]
        return [every[number] for number in own]

    def counts(epoch: int) -> np.ndarray:
        return np.stack([np.bincount(batch.labels_B.numpy(), minlength=3) for batch in epochs(epoch)])

    return loop.Data(train, lambda: dev[rank::size], counts)


def logits(model: EmotionClassifier, batch: Batch) -> torch.Tensor:
    """In evaluation mode."""
    model.eval()
    with torch.inference_mode():
        return model(batch.inputs, batch.lengths_B)


def cached(model: EmotionClassifier, batch: Batch, precision: str = "fp32") -> Batch:
    """The batch as a cache holds it, through bytes, and padded as the stream pads; sets the model's prefix."""
    form = prefix.of(model.experiment, precision)
    with autocast(precision, "cpu"):
        arrays = prefix.compute(form, model.backbone.eval(), batch)
    rows = [form.read(pa.py_buffer(array.tobytes())) for array in arrays]
    inputs = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for number, row in enumerate(rows):
        inputs[number, : len(row)] = row
    model.prefix = form
    lengths_B = torch.tensor([len(row) for row in rows])
    return Batch(batch.utterance_ids, torch.from_numpy(inputs), lengths_B, batch.labels_B)


def with_sections(base: Experiment, **sections: object) -> Experiment:
    """A copy of an experiment with other sections."""
    return Experiment.model_validate(to_dict(base) | sections)
