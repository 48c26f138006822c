"""How to use model.onnx with numpy and onnxruntime alone; `ser-ray export` writes this file beside it.

    from onnx_predict import answer, load
    answer(load("DIRECTORY"), samples)      # (T,) float in [-1, 1], mono, 16 kHz -> {emotion: probability}

It trims and cuts a recording into windows as ser_ray does, and averages over the windows. As a program it answers all
arrays of a file: python onnx_predict.py DIRECTORY RECORDINGS.npz ANSWERS.npy
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

SILENCE = 10 ** (-60 / 20)  # a peak below -60 dBFS
FRAME, HOP, MARGIN = 2048, 512, 800  # samples: of trimming; and what is left around the speech, 50 ms


def load(directory: str) -> Any:
    """The model, as an onnxruntime.InferenceSession."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs that may be left out
    path = Path(directory) / "model.onnx"
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answer(session: Any, samples: np.ndarray) -> dict[str, float]:
    """The probability of each emotion of a recording. Raises ValueError for silence, and what is too short."""
    metadata = session.get_modelmeta().custom_metadata_map
    found = [_run(session, window) for window in windows(samples, **json.loads(metadata["audio"]))]
    return dict(zip(json.loads(metadata["labels"]), np.mean(found, axis=0).tolist(), strict=True))


def windows(
    samples: np.ndarray, trim_db: float | None, min_seconds: float, max_seconds: float, rate: int = 16_000
) -> Iterator[np.ndarray]:
    """The equal windows of at most ``max_seconds`` of a recording without its quiet ends, (T,) float32 each."""
    samples = np.asarray(samples, np.float32)
    if _is_silent(samples):
        raise ValueError("silent: the peak is below -60 dBFS")
    samples = samples / max(1.0, float(np.abs(samples).max()))
    samples = samples[slice(*_bounds(samples, trim_db))]
    if len(samples) < min_seconds * rate:
        raise ValueError(f"too short: {len(samples) / rate:.2f} s, less than {min_seconds:g} s")
    whole = len(samples) <= max_seconds * rate
    for window in np.array_split(samples, 1 if whole else -(-len(samples) // int(max_seconds * rate))):
        if whole or not _is_silent(window):
            yield (np.rint(window * 32768).clip(-32768, 32767) / 32768).astype(np.float32)  # as 16 bits hold it


def _run(session: Any, window: np.ndarray) -> np.ndarray:
    given = {"waveform": window[None], "lengths": np.array([len(window)])}
    inputs = {one.name: given[one.name] for one in session.get_inputs() if one.name in given}
    (probabilities_1K,) = session.run(["probabilities"], inputs)
    found: np.ndarray = probabilities_1K[0].astype(np.float64)
    return found


def _is_silent(samples: np.ndarray) -> bool:
    """Without a constant offset, as of a microphone that is off."""
    return not len(samples) or float(np.abs(samples - samples.mean()).max()) < SILENCE


def _bounds(samples: np.ndarray, trim_db: float | None) -> tuple[int, int]:
    """The first sample between the quiet ends, and that after the last: frames within ``trim_db`` of the loudest."""
    if trim_db is None:
        return 0, len(samples)
    padded = np.pad(samples, FRAME // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    power = np.maximum(np.einsum("ft,ft->f", frames, frames) / FRAME, 1e-10)
    loud = np.flatnonzero(10 * np.log10(power / power.max()) > -trim_db)
    start, end = int(loud[0]) * HOP, int(loud[-1] + 1) * HOP
    return max(0, start - MARGIN), min(min(end, len(samples)) + MARGIN, len(samples))


def main(directory: str, recordings: str, answers: str) -> None:
    """Answer every array of RECORDINGS.npz, and write the probabilities (N, K) in the order of the labels."""
    session = load(directory)
    with np.load(recordings) as waveforms:
        rows = [list(answer(session, waveforms[str(n)]).values()) for n in range(len(waveforms.files))]
    np.save(answers, np.array(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
