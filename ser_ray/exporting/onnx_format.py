"""onnx: one file that any ONNX runtime executes, `ser_ray.exporting.graph`, and a page of Python that feeds it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ser_ray.exporting import ONNX, PLACE, Options, graph, smaller
from ser_ray.exporting.merged import all_merged
from ser_ray.exporting.proof import in_fresh_process
from ser_ray.models.ensemble import Ensemble, Model, uses_voices, widths_of

DTYPES: Final = ("fp32", "fp16", "int8")
LIBRARY: Final = "onnx"
SCRIPT: Final = Path(__file__).with_name("onnx_predict.py")
NOTES: Final = {
    "fp32": [],
    "fp16": ["The backbone's weights are held in fp16, and computed with in fp32."],
    "int8": ["The backbone's linear layers are in int8 (dynamic quantisation of onnxruntime), all else is in fp32."],
}


def check(model: Model) -> None:
    """Raises UserError where a library is missing; every head can be traced."""
    graph.check_installed()


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Write model.onnx, and the program that uses it."""
    save(all_merged(directory, options), target, options.dtype)
    shutil.copyfile(SCRIPT, target / SCRIPT.name)
    return NOTES[options.dtype]


def save(model: Model, target: Path, dtype: str = "fp32", one: bool = False) -> None:
    """Write a model that is `merged` to ``target``. ``one``: as audonnx can feed it."""
    save_traced(graph.traced(model, one), target, dtype)


def save_traced(traced: Any, target: Path, dtype: str) -> None:
    """Write a graph of `graph.traced`, which is changed by it."""
    if dtype == "int8":
        smaller.save_int8(traced, target / ONNX)
        return
    if dtype == "fp16":
        smaller.to_fp16(traced)
    graph.save(traced, target / ONNX)


def predict(target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
    """As `Format.predict`: by onnxruntime."""
    return in_fresh_process(SCRIPT, target, waveforms)


def usage(model: Model) -> str:
    """As `Format.usage`."""
    width = sum(widths_of(model))
    several = ", those of the members side by side" if isinstance(model, Ensemble) else ""
    voice = (
        " Three more inputs say what is known of the speaker, and may be left out: voice_count (voices,), voice_mean "
        f"and voice_variance (voices, {width}), float32, for one voice or one of each row; they are the numbers of a "
        f"file that `ser-ray enrol` writes: recordings, mean, variance{several}."
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
        f"(batch, {width}){several}.{voice if uses_voices(model) else ''} Log-mel or "
        "normalisation is inside. Quiet ends are to be cut before, and recordings longer than "
        f"{model.experiment.audio.max_seconds:g} s to be cut into windows: `onnx_predict.py` does both. Labels and "
        "settings are in the metadata of the file, as JSON."
    )
