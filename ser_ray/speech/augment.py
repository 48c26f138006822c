"""Augmentation of training speech: gain, noise, speed and crops on the waveform, masks on the features.

The random values for a waveform depend on the epoch's seed and the utterance alone, so that order, batches, readers and
threads do not matter. Waveforms are NumPy's: it leaves other threads of Python free meanwhile, and starts none of its
own, as torch would. Masks on features are drawn from torch's own generator, which the loop seeds every epoch.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
import soxr
import torch

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
    waveform = waveform_T
    if settings.crop_seconds is not None:
        surplus = max(0, len(waveform) - int(settings.crop_seconds * SAMPLING_RATE))
        first = int(start * (surplus + 1))
        waveform = waveform[first : first + len(waveform) - surplus]
    if settings.speed:
        waveform = at_speed(waveform, 1 + (int(way * 3) - 1) * settings.speed)[:MAX_SAMPLES]
    if settings.noise_snr_db is not None:
        low, high = settings.noise_snr_db
        noise = rng.standard_normal(len(waveform), dtype=np.float32)
        waveform = waveform + noise * np.float32(noise_scale(waveform, noise, low + (high - low) * snr))
    if settings.gain_db:
        waveform = waveform * np.float32(10 ** (settings.gain_db * (2 * level - 1) / 20))
    return np.ascontiguousarray(waveform, dtype=np.float32)


def noise_scale(waveform_T: np.ndarray, noise_T: np.ndarray, snr_db: float) -> float:
    """What the noise is multiplied with, so that the energy of the waveform is ``snr_db`` dB above its own."""
    signal, noise = (np.square(x).sum(dtype=np.float64) for x in (waveform_T, noise_T))
    return float(np.sqrt(signal / noise) * 10 ** (-snr_db / 20))


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
    beyond ``frames_B`` stay as they are. Returns a copy. All on the device, for all utterances at once: none is asked
    for its length, for which the host would have to wait.
    """
    channels, frames = features_BCF.shape[1:]
    own_B1F = _below(frames_B, frames)[:, None]
    own_BCF = features_BCF.detach().float().masked_fill(~own_B1F, 0)
    mean_B11 = own_BCF.sum((1, 2), keepdim=True) / (channels * frames_B)[:, None, None]
    bands_BC = _stretches(torch.full_like(frames_B, channels), channel_share, channels)
    stretches_BF = _stretches(frames_B, time_share, frames)
    masked_BCF = (bands_BC[:, :, None] | stretches_BF[:, None]) & own_B1F
    return torch.where(masked_BCF, mean_B11.to(features_BCF.dtype), features_BCF)


# -- below: how it is done


def _stretches(sizes_B: torch.Tensor, share: float, longest: int) -> torch.Tensor:
    """`NUM_MASKS` stretches of the first ``sizes_B`` places of every row, each shorter than ``share`` of them: (B,
    longest), True where masked."""
    # In fp64: the share of a size must not be rounded up to the next whole number.
    size_B1 = sizes_B[:, None].double()
    width_draw_BM, place_draw_BM = torch.rand(2, len(sizes_B), NUM_MASKS, device=sizes_B.device)
    width_BM = width_draw_BM * (share * size_B1).floor()
    first_BM = (place_draw_BM * (size_B1 - width_BM)).long()
    end_BM = first_BM + width_BM.long()
    return (_below(end_BM, longest) & ~_below(first_BM, longest)).any(1)


def _below(ends: torch.Tensor, longest: int) -> torch.Tensor:
    """(..., longest), True on the first ``ends`` of every row."""
    return torch.arange(longest, device=ends.device) < ends[..., None]
