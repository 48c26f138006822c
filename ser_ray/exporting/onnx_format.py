"""onnx: one file that any ONNX runtime executes, `ser_ray.exporting.graph`, and a page of Python that feeds it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray.exporting import ONNX, PLACE, Options, graph, smaller
from ser_ray.exporting.merged import merged
from ser_ray.exporting.proof import in_fresh_process
from ser_ray.models.classifier import EmotionClassifier

DTYPES: Final = ("fp32", "fp16", "int8")
LIBRARY: Final = "onnx"
SCRIPT: Final = Path(__file__).with_name("onnx_predict.py")
NOTES: Final = {
    "fp32": [],
    "fp16": ["The backbone's weights are held in fp16, and computed with in fp32."],
    "int8": ["The backbone's linear layers are in int8 (dynamic quantisation of onnxruntime), all else is in fp32."],
}


def check(model: EmotionClassifier) -> None:
    """Raises UserError where a library is missing; every head can be traced."""
    graph.check_installed()


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Write model.onnx, and the program that uses it."""
    save(merged(directory, options), target, options.dtype)
    shutil.copyfile(SCRIPT, target / SCRIPT.name)
    return NOTES[options.dtype]


def save(model: EmotionClassifier, target: Path, dtype: str = "fp32", one: bool = False) -> None:
    """Write a model that is `merged` to ``target``. ``one``: as audonnx can feed it."""
    traced = graph.traced(model, one)
    if dtype == "int8":
        smaller.save_int8(traced, target / ONNX)
        return
    if dtype == "fp16":
        smaller.to_fp16(traced)
    graph.save(traced, target / ONNX)


def predict(target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
    """As `Format.predict`: by onnxruntime."""
    return in_fresh_process(SCRIPT, target, waveforms)


def usage(model: EmotionClassifier) -> str:
    """As `Format.usage`."""
    voice = (
        " Three more inputs say what is known of the speaker, and may be left out: voice_count (voices,), voice_mean "
        f"and voice_variance (voices, {model.head.embedding_width}), float32, for one voice or one of each row; they "
        "are the numbers of a file that `ser-ray enrol` writes: recordings, mean, variance."
    )
    return (
        "```python\n"
        "from onnx_predict import answer, load  # the file beside model.onnx: numpy and onnxruntime alone\n\n"
        f'model = load("{PLACE}")\n'
        "answer(model, samples)  # (T,) float in [-1, 1], mono, 16 kHz\n"
        "```\n\n"
        f"Or `ser-ray predict {PLACE} call.wav`, with `pip install 'ser-ray[onnx]'`, for any audio file.\n\n"
        "model.onnx takes `waveform` (batch, samples), float32 at 16 kHz, and `lengths` (batch,), int64: each row is "
        "zero beyond its length. It gives `probabilities` (batch, emotions), with the temperature, and `embedding` "
        f"(batch, {model.head.embedding_width}).{voice if model.head.speaker is not None else ''} Log-mel or "
        "normalisation is inside. Quiet ends are to be cut before, and recordings longer than "
        f"{model.experiment.audio.max_seconds:g} s to be cut into windows: `onnx_predict.py` does both. Labels and "
        "settings are in the metadata of the file, as JSON."
    )
