"""Augmentation of training speech: gain, noise, speed and crops on the waveform, masks on the features.

The random values for a waveform depend on the epoch's seed and the utterance alone, so that order, batches and readers
do not matter. Masks on features are drawn from torch's own generator, which the loop seeds every epoch.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
import soxr
import torch
from torchaudio import functional

from ser_ray.config import Augment
from ser_ray.schema import SAMPLING_RATE

MAX_SAMPLES: Final = 30 * SAMPLING_RATE
"""The longest possible utterance (`audio.max_seconds`) and input of Whisper: a slowed waveform is cut there."""
NUM_MASKS: Final = 2
"""Along each axis, as in SpecAugment's policies LD and SM (arXiv 1904.08779, table 1)."""


def augmented(waveform_T: np.ndarray, utterance_id: str, settings: Augment, seed: int) -> np.ndarray:
    """An augmented version of a waveform: crop, speed, noise, gain, in this order; (T,) -> (T',) float32.

    The gain comes last: a loud version is not clipped, and may exceed 1.

    >>> tone = np.sin(np.arange(16_000, dtype=np.float32))
    >>> louder = augmented(tone, "a/1", Augment(gain_db=6), seed=0)
    >>> bool(np.allclose(louder / louder.max(), tone / tone.max(), atol=1e-4)), bool(np.allclose(louder, tone))
    (True, False)
    """
    rng = np.random.default_rng([seed, zlib.crc32(utterance_id.encode())])
    # All are drawn, used or not, so that switching one on does not change the others.
    start, way, level, snr = rng.uniform(size=4)
    waveform = torch.from_numpy(waveform_T)
    if settings.crop_seconds is not None:
        surplus = max(0, len(waveform) - int(settings.crop_seconds * SAMPLING_RATE))
        first = int(start * (surplus + 1))
        waveform = waveform[first : first + len(waveform) - surplus]
    if settings.speed:
        waveform = torch.from_numpy(at_speed(waveform.numpy(), 1 + (int(way * 3) - 1) * settings.speed)[:MAX_SAMPLES])
    if settings.noise_snr_db is not None:
        low, high = settings.noise_snr_db
        noise = torch.from_numpy(rng.standard_normal(len(waveform), dtype=np.float32))
        waveform = functional.add_noise(waveform, noise, torch.tensor(low + (high - low) * snr, dtype=torch.float32))
    if settings.gain_db:
        waveform = waveform * 10 ** (settings.gain_db * (2 * level - 1) / 20)
    return np.ascontiguousarray(waveform.numpy(), dtype=np.float32)


def at_speed(waveform_T: np.ndarray, factor: float) -> np.ndarray:
    """The waveform played ``factor`` times as fast, which moves its pitch too: (T,) -> (T / factor,).

    The factor is rounded to a thousandth: soxr is fast for any ratio of small integers, but 0.9299999 would need a
    filter of gigabytes.
    """
    thousandths = round(factor * 1000)
    return waveform_T if thousandths == 1000 else np.asarray(soxr.resample(waveform_T, thousandths, 1000))


def mask(features_BCF: torch.Tensor, frames_B: torch.Tensor, channel_share: float, time_share: float) -> torch.Tensor:
    """SpecAugment (arXiv 1904.08779) without time warping: masked values become the mean of their utterance.

    Two masks along each axis, each up to the given share of the channels C, or of the utterance's own frames; frames
    beyond ``frames_B`` stay as they are. Returns a copy.
    """
    masked_BCF = features_BCF.clone()
    bands = int(channel_share * features_BCF.shape[1])
    for row, frames in enumerate(frames_B.tolist()):
        own_CF = features_BCF[row, :, :frames].float()
        mean = float(own_CF.mean())
        for _ in range(NUM_MASKS):
            own_CF = functional.mask_along_axis(own_CF, bands, mean, axis=0)
            own_CF = functional.mask_along_axis(own_CF, int(time_share * frames), mean, axis=1)
        masked_BCF[row, :, :frames] = own_CF
    return masked_BCF
