"""The most confident mistakes with their audio: either the label is doubtful or the model is wrong.

The recordings are read from the prepared shards and become data URIs, so that a page that holds them opens anywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray.evaluation.predictions import Predictions
from ser_ray.schema import SAMPLING_RATE, UserError
from ser_ray.speech import shards

BANDS: Final = 64
"""Mel bands of a small spectrogram, one row of pixels each."""
FLOOR_DB: Final = 60.0
"""Levels this far below the loudest point are left blank; they are mostly room noise."""


@dataclass(frozen=True)
class Mistake:
    """A misclassified utterance, with the probabilities of the predicted and of the true emotion."""

    utterance_id: str
    speaker: str
    true: str
    predicted: str
    probability: float
    true_probability: float


@dataclass(frozen=True)
class Recording:
    """The audio and the spectrogram of an utterance."""

    seconds: float
    audio: str
    """A data URI of FLAC."""
    spectrogram: str
    """A data URI of a PNG, black of varying opacity: 0 to 8 kHz on the mel scale upwards, time to the right."""


def most_confident(predictions: Predictions, count: int = 12) -> list[Mistake]:
    """The ``count`` misclassified utterances with the highest confidence; one of several runs is listed once."""
    predicted = predictions.predicted
    confidence = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != predictions.labels)
    chosen: dict[str, Mistake] = {}
    for i in sorted(wrong.tolist(), key=lambda i: (-confidence[i], predictions.utterance_ids[i])):
        if len(chosen) == count:
            break
        mistake = Mistake(
            utterance_id=predictions.utterance_ids[i],
            speaker=predictions.speakers[i],
            true=predictions.emotions[predictions.labels[i]],
            predicted=predictions.emotions[predicted[i]],
            probability=float(confidence[i]),
            true_probability=float(predictions.probabilities[i, predictions.labels[i]]),
        )
        chosen.setdefault(mistake.utterance_id, mistake)
    return list(chosen.values())


def recordings(utterance_ids: Sequence[str], directories: Iterable[Path]) -> dict[str, Recording]:
    """Utterance id -> its recording, from directories of prepared shards.

    Raises UserError if a directory or a shard is missing, or an utterance is in none of them.
    """
    by_id: dict[str, Recording] = {}
    for directory in directories:
        for path in shards.shard_paths(directory):
            if not path.is_file():
                raise UserError(f"{path}: no such shard; run ser-ray prepare")
            wanted = np.flatnonzero(np.isin(shards.read_ids(path), list(utterance_ids)))
            if len(wanted):
                rows = shards.read_rows(path, wanted, ["utterance_id", "audio"])
                for utterance_id, audio in zip(
                    rows["utterance_id"].to_pylist(), rows["audio"].to_pylist(), strict=True
                ):
                    by_id[utterance_id] = recording(np.frombuffer(audio, dtype="<i2"))
    if missing := [utterance_id for utterance_id in utterance_ids if utterance_id not in by_id]:
        raise UserError(f"{missing[0]}: not in the prepared speech any more; run ser-ray prepare")
    return by_id


def recording(samples_T: np.ndarray) -> Recording:
    """The audio and the spectrogram of int16 samples (T,) at 16 kHz, as data URIs."""
    import soundfile

    flac, picture = io.BytesIO(), io.BytesIO()
    soundfile.write(flac, samples_T, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    _write_png(log_mel(samples_T / 32768), picture)
    return Recording(
        seconds=len(samples_T) / SAMPLING_RATE,
        audio=_data_uri("audio/flac", flac.getvalue()),
        spectrogram=_data_uri("image/png", picture.getvalue()),
    )


def log_mel(waveform_T: np.ndarray) -> np.ndarray:
    """A log-mel spectrogram by librosa, (BANDS, F): 25 ms every 10 ms; 0 is the floor, 1 the loudest point."""
    import librosa  # takes a second to import, and pages without audio do not need it

    power = librosa.feature.melspectrogram(
        y=waveform_T.astype(np.float32), sr=SAMPLING_RATE, n_fft=400, hop_length=160, n_mels=BANDS
    )
    decibels = librosa.power_to_db(power, ref=np.max, top_db=FLOOR_DB)
    return np.asarray(np.clip(1 + decibels / FLOOR_DB, 0, 1))


# -- below: how it is done


def _write_png(levels_BF: np.ndarray, file: io.BytesIO) -> None:
    """Low bands at the bottom. Levels are opacity, so that the picture fits light and dark pages."""
    from matplotlib.image import imsave

    pixels = np.zeros((*levels_BF.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(255 * levels_BF[::-1])
    imsave(file, pixels, format="png")


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
