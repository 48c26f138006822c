"""The most confident mistakes, and how they sound: where a label is doubtful or a model hears something else.

The recordings come from the prepared shards, as data URIs, so that a page which holds them opens anywhere.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray.schema import SAMPLING_RATE, Predictions, UserError
from ser_ray.speech import shards

BANDS: Final = 64
"""Mel bands of a small spectrogram, one row of pixels each."""
FLOOR_DB: Final = 60.0
"""What lies so far below the loudest point is left empty; below is mostly the noise of the room."""


@dataclass(frozen=True)
class Mistake:
    """An utterance that the model got wrong, with the probabilities of what it said and of the true emotion."""

    utterance_id: str
    speaker: str
    true: str
    predicted: str
    probability: float
    true_probability: float


@dataclass(frozen=True)
class Recording:
    """An utterance to listen to and look at."""

    seconds: float
    audio: str
    """A data URI of FLAC."""
    spectrogram: str
    """A data URI of a PNG, black of varying opacity: 0 to 8 kHz on the mel scale upwards, time to the right."""


def most_confident(predictions: Predictions, count: int = 12) -> list[Mistake]:
    """The ``count`` wrong utterances with the highest probability; one that several runs got wrong is named once."""
    predicted = predictions.predicted
    confidence = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != predictions.labels)
    found: dict[str, Mistake] = {}
    for i in sorted(wrong.tolist(), key=lambda i: (-confidence[i], predictions.utterance_ids[i])):
        if len(found) == count:
            break
        mistake = Mistake(
            utterance_id=predictions.utterance_ids[i],
            speaker=predictions.speakers[i],
            true=predictions.emotions[predictions.labels[i]],
            predicted=predictions.emotions[predicted[i]],
            probability=float(confidence[i]),
            true_probability=float(predictions.probabilities[i, predictions.labels[i]]),
        )
        found.setdefault(mistake.utterance_id, mistake)
    return list(found.values())


def recordings(utterance_ids: Sequence[str], directories: Iterable[Path]) -> dict[str, Recording]:
    """Utterance id -> its recording, from directories of prepared shards.

    Raises UserError where a directory or a shard is not there any more, or an utterance is in none of them.
    """
    found: dict[str, Recording] = {}
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
                    found[utterance_id] = recording(np.frombuffer(audio, dtype="<i2"))
    if missing := [utterance_id for utterance_id in utterance_ids if utterance_id not in found]:
        raise UserError(f"{missing[0]}: not in the prepared speech any more; run ser-ray prepare")
    return found


def recording(samples_T: np.ndarray) -> Recording:
    """A player's and a picture's data of int16 samples (T,) at 16 kHz."""
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
    """(BANDS, F) in 0..1: a log-mel spectrogram by librosa, 25 ms every 10 ms, from the floor to the loudest."""
    import librosa  # takes a second to import, and pages without audio do not need it

    power = librosa.feature.melspectrogram(
        y=waveform_T.astype(np.float32), sr=SAMPLING_RATE, n_fft=400, hop_length=160, n_mels=BANDS
    )
    decibels = librosa.power_to_db(power, ref=np.max, top_db=FLOOR_DB)
    return np.asarray(np.clip(1 + decibels / FLOOR_DB, 0, 1))


# -- below: how it is done


def _write_png(levels_BF: np.ndarray, file: io.BytesIO) -> None:
    """Low bands at the bottom; as opacity, so that the ground shows through in light and dark alike."""
    from matplotlib.image import imsave

    pixels = np.zeros((*levels_BF.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(255 * levels_BF[::-1])
    imsave(file, pixels, format="png")


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
