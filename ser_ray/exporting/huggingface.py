"""hf: a directory that transformers loads without ser_ray, by the one modelling file that lies in it.

No class of transformers holds the heads of this project: all of them normalise every frame before it is pooled, and a
recording is trimmed and cut into windows before that. So `modeling_emotion` is always written beside the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ser_ray import disk
from ser_ray.exporting import Options
from ser_ray.exporting.merged import merged
from ser_ray.exporting.modeling_emotion import EmotionConfig, EmotionFeatureExtractor, EmotionForAudioClassification
from ser_ray.exporting.proof import in_fresh_process
from ser_ray.models.backbones import Whisper
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.heads.pooled import PooledHead
from ser_ray.models.voice_file import digest
from ser_ray.schema import SAMPLING_RATE, UserError

DTYPES: Final = ("fp32", "fp16")
"""fp16: half the size. The weights are rounded, and computed with in fp32, which every machine can."""
POOLINGS: Final = ("mean", "statistics", "attentive")
LIBRARY: Final = "transformers"
SCRIPT: Final = Path(__file__).with_name("hf_predict.py")
_NOT_OF_THE_ENCODER: Final = ("dtype", "_name_or_path", "id2label", "label2id", "transformers_version")
"""Keys of its configuration that are not written: of a head, and of the place that it was loaded from."""
_PIPELINE: Final = {
    "audio-classification": {
        "impl": "modeling_emotion.EmotionPipeline",
        "pt": ["AutoModelForAudioClassification"],
    }
}


def check(model: EmotionClassifier) -> None:
    """Raises UserError for a head or a pooling that somebody has added: the modelling file does not know it."""
    head = model.experiment.head
    if type(model.head) is not PooledHead or head.pooling not in POOLINGS:
        raise UserError(
            f"head.kind {head.kind} with head.pooling {head.pooling} cannot be exported; add it to "
            "ser_ray/exporting/modeling_emotion.py"
        )


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Write config.json, model.safetensors, preprocessor_config.json and the modelling file."""
    save(merged(directory, options), target, options.dtype)
    return []


def save(model: EmotionClassifier, target: Path, dtype: str = "fp32") -> None:
    """Write a model without low-rank updates to ``target``."""
    theirs = EmotionForAudioClassification(_config(model))
    theirs.encoder.load_state_dict(model.backbone.model.state_dict())
    head = model.head.state_dict()
    head.pop("speaker.between_P", None)  # for doubts about a voice, which an export does not have
    theirs.head.load_state_dict(head)
    if isinstance(model.backbone, Whisper):
        filters: torch.Tensor = model.backbone.logmel.mel.mel_scale.fb
        theirs.mel_filters.copy_(filters)
    if dtype == "fp16":
        theirs.half()
    EmotionConfig.register_for_auto_class()
    EmotionForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
    EmotionFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
    theirs.save_pretrained(target)
    config = target / "config.json"
    disk.write_json(config, disk.read_json(config) | {"dtype": "float32"})  # computed with, whatever is in the file
    shutil.copymode(config, target / "model.safetensors")  # which its owner alone could read
    audio = model.experiment.audio
    EmotionFeatureExtractor(trim_db=audio.trim_db, min_seconds=audio.min_seconds).save_pretrained(target)


def predict(target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
    """As `Format.predict`: by transformers' pipeline."""
    return in_fresh_process(SCRIPT, target, waveforms)


def usage(model: EmotionClassifier) -> str:
    """As `Format.usage`."""
    voice = (
        "\n\nIt answers better when it knows the speaker by other recordings: `ser-ray enrol` of the checkpoint writes "
        'a voice, and `ask(recording, voice="anna.json")` uses it.\n'
    )
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        'ask = pipeline("audio-classification", model="THIS_DIRECTORY", trust_remote_code=True)\n'
        'ask("call.wav")  # or {"raw": samples, "sampling_rate": 44100}\n'
        "```\n\n"
        "transformers 5 or newer; with `pip install soundfile soxr`, recordings of any rate get the answers of "
        "`ser-ray predict`; without them transformers decodes by ffmpeg and torchaudio resamples, and probabilities "
        "differ a little. Channels are averaged, quiet ends are cut, a recording that is longer than "
        f"{model.experiment.audio.max_seconds:g} s is answered in equal windows, whose probabilities are averaged. "
        "Silence, and less than "
        f"{model.experiment.audio.min_seconds:g} s of speech, are a ValueError. The code that transformers asks to be "
        "trusted is `modeling_emotion.py` of this directory."
        f"{voice if model.experiment.head.speaker != 'none' else ''}"
    )


def _config(model: EmotionClassifier) -> EmotionConfig:
    head, audio = model.experiment.head, model.experiment.audio
    encoder: dict[str, Any] = model.backbone.model.config.to_dict()
    emotions = dict(enumerate(model.experiment.emotions))
    return EmotionConfig(
        encoder={key: value for key, value in encoder.items() if key not in _NOT_OF_THE_ENCODER},
        normalize=bool(getattr(model.backbone, "normalize", False)),
        layer_mix=head.layer_mix,
        pooling=head.pooling,
        hidden=head.hidden,
        dropout=head.dropout,
        speaker=head.speaker,
        speaker_shrinkage=head.speaker_shrinkage,
        logit_temperature=getattr(model, "temperature", 1.0),
        max_samples=int(audio.max_seconds * SAMPLING_RATE),
        checkpoint=digest(model),
        id2label=emotions,
        label2id={emotion: number for number, emotion in emotions.items()},
        custom_pipelines=_PIPELINE,
    )
