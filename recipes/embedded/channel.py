"""Random changes to dry speech: a manner of speaking, then a channel of room, noise, filters and telephone.

The manner can carry emotion, so the embedded backbones are trained to predict it; the channel is what they are trained
to ignore. All amounts are drawn from the generator that is passed in. Nothing moves in time by more than a millisecond,
so targets of 20 ms frames stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.fft
import soxr

from ser_ray.schema import SAMPLING_RATE

FRAME: Final = SAMPLING_RATE // 50
"""Samples of a frame of 20 ms; frame f of a target covers those from ``FRAME * f`` on."""
MANNER: Final = ("tilt", "breath", "tremor", "tremor_rate", "creak", "slope", "level")
"""In dB per octave above 500 Hz; share of the envelope; depth; Hz (0 without tremor); depth; dB per s; dBFS (rms)."""
MU: Final = 255
"""Parameter of the mu-law (ITU-T G.711)."""
A: Final = 87.6
"""Parameter of the A-law (ITU-T G.711)."""
PEAK: Final = 0.99
"""Largest magnitude of a waveform, below full scale."""


@dataclass(frozen=True)
class Rendered:
    """Dry speech with a manner, (T,) float32; the same after the channel; the amounts of `MANNER`."""

    clean_T: np.ndarray
    waveform_T: np.ndarray
    manner: dict[str, float]


def render(waveform_T: np.ndarray, rng: np.random.Generator) -> Rendered:
    """Draw a manner and a channel for dry speech at 16 kHz, (T,) float; it must not be silent.

    The returned level is the measured one: a waveform with high peaks stays below the level that was drawn.
    """
    assert waveform_T.ndim == 1
    assert waveform_T.any(), "nothing to render"
    manner = _draw_manner(len(waveform_T) / SAMPLING_RATE, rng)
    clean_T = _speak(waveform_T.astype(np.float32), manner, rng)
    manner["level"] = float(20 * np.log10(_rms(clean_T)))
    return Rendered(clean_T, _transmit(clean_T, rng), manner)


def frame_energy(clean_T: np.ndarray) -> np.ndarray:
    """(T,) -> (T // 320,) float32: dBFS of every frame of 20 ms, at least -100."""
    frames_FT = clean_T[: len(clean_T) // FRAME * FRAME].reshape(-1, FRAME)
    return (10 * np.log10(np.mean(frames_FT**2, axis=1) + 1e-10)).astype(np.float32)


# -- below: how it is done


def _draw_manner(seconds: float, rng: np.random.Generator) -> dict[str, float]:
    """Breath, tremor and creak are each absent from half of the voices, independently; a slope changes the level of a
    waveform by 18 dB at most."""
    breath, tremor, creak = rng.uniform(0, (0.3, 0.5, 0.6)) * (rng.random(3) < 0.5)
    steepest = min(6.0, 18 / seconds)
    return {
        "tilt": rng.uniform(-4, 4),
        "breath": float(breath),
        "tremor": float(tremor),
        "tremor_rate": rng.uniform(4, 9) if tremor else 0.0,
        "creak": float(creak),
        "slope": rng.uniform(-steepest, steepest),
        "level": rng.uniform(-45, -15),
    }


def _speak(waveform_T: np.ndarray, manner: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """(T,) float32 with the manner applied, its level last."""
    size = len(waveform_T)
    seconds_T = np.arange(size, dtype=np.float32) / SAMPLING_RATE
    spoken_T = _filtered(waveform_T, _tilt(_frequencies(size), manner["tilt"]))
    if manner["breath"]:
        spoken_T = spoken_T + manner["breath"] * _envelope(spoken_T) * _aspiration(size, rng)
    swing_T = 10 ** (manner["slope"] * (seconds_T - seconds_T[-1] / 2) / 20)
    if manner["tremor"]:
        swing_T = swing_T * (
            1 + manner["tremor"] * np.sin(2 * np.pi * (manner["tremor_rate"] * seconds_T + rng.random()))
        )
    if manner["creak"]:
        swing_T = swing_T * np.clip(1 + manner["creak"] * _band_noise(size, 20, 50, rng) / 2, 0, None)
    spoken_T = spoken_T * swing_T
    spoken_T = spoken_T * (10 ** (manner["level"] / 20) / _rms(spoken_T))
    return _held(spoken_T)


def _transmit(clean_T: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(T,) float32: half in a room, three quarters noisy, half band-limited, one in six over a telephone, one in twenty
    clipped."""
    gain_W = _draw_filter(_frequencies(len(clean_T)), rng)
    room_R = _room(rng.uniform(0.1, 0.8), rng.uniform(-3, 15), rng) if rng.random() < 0.5 else np.ones(1, np.float32)
    recorded_T = _filtered(clean_T, gain_W, room_R)
    recorded_T = recorded_T * (_rms(clean_T) / max(_rms(recorded_T), 1e-9))
    if rng.random() < 0.75:
        recorded_T = recorded_T + _noise(recorded_T, rng.uniform(5, 40), rng.uniform(0, 2), rng)
    if rng.random() < 1 / 6:
        recorded_T = _telephone(_held(recorded_T), a_law=rng.random() < 0.5)
    if rng.random() < 0.05:
        peak = np.abs(recorded_T).max() * rng.uniform(0.3, 0.8)
        recorded_T = np.clip(recorded_T, -peak, peak)
    return _held(recorded_T)


def _draw_filter(frequencies_W: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(W,) gain: a random 2 dB (standard deviation) at six frequencies from 60 Hz to 8 kHz; half are also band-limited.

    Zero phase, so nothing moves in time; the band limits have the gain of Butterworth filters of order 4.
    """
    places = np.geomspace(60, 8000, 6)
    octaves_W = np.log2(np.maximum(frequencies_W, 30))
    gain_W = 10 ** (np.interp(octaves_W, np.log2(places), rng.normal(0, 2, size=6)) / 20)
    if rng.random() < 0.5:
        low, high = rng.uniform(20, 300), rng.uniform(3400, 8000)
        gain_W = (
            gain_W / np.sqrt(1 + (low / np.maximum(frequencies_W, 1)) ** 8) / np.sqrt(1 + (frequencies_W / high) ** 8)
        )
    return gain_W.astype(np.float32)


def _room(rt60: float, direct_db: float, rng: np.random.Generator) -> np.ndarray:
    """(R,) impulse response of a room: the direct sound, then noise that falls by 60 dB in ``rt60`` seconds (Polack).

    ``direct_db``: energy of the direct sound over that of the rest.
    """
    seconds_R = np.arange(int(rt60 * SAMPLING_RATE), dtype=np.float32) / SAMPLING_RATE
    tail_R = rng.standard_normal(len(seconds_R), dtype=np.float32) * 10 ** (-3 * seconds_R / rt60)
    tail_R[: SAMPLING_RATE // 500] = 0  # the first wall is 70 cm away
    response_R = tail_R * (10 ** (-direct_db / 20) / np.sqrt(np.sum(tail_R**2)))
    response_R[0] = 1
    return response_R


def _noise(speech_T: np.ndarray, snr_db: float, colour: float, rng: np.random.Generator) -> np.ndarray:
    """(T,) noise whose power falls by the ``colour``-th power of frequency from 50 Hz on: 0 white, 1 pink, 2 brown."""
    size = len(speech_T)
    white_T = rng.standard_normal(size, dtype=np.float32)
    noise_T = _filtered(white_T, np.maximum(_frequencies(size), 50) ** np.float32(-colour / 2))
    return noise_T * (_rms(speech_T) * 10 ** (-snr_db / 20) / _rms(noise_T))


def _telephone(waveform_T: np.ndarray, a_law: bool) -> np.ndarray:
    """(T,) -> (T,) through 8 kHz and 8 bits of G.711."""
    narrow_N = soxr.resample(waveform_T, SAMPLING_RATE, 8000)
    coded_N = _a_law(narrow_N) if a_law else _mu_law(narrow_N)
    wide_T = soxr.resample(coded_N.astype(np.float32), 8000, SAMPLING_RATE)
    return np.pad(wide_T, (0, max(0, len(waveform_T) - len(wide_T))))[: len(waveform_T)]


def _mu_law(samples_T: np.ndarray) -> np.ndarray:
    """Companded by F(x) = sgn(x) ln(1 + mu |x|) / ln(1 + mu), rounded to 256 steps, expanded; for [-1, 1]."""
    coded_T = _steps(np.log1p(MU * np.abs(samples_T)) / np.log1p(MU))
    return np.sign(samples_T) * np.expm1(coded_T * np.log1p(MU)) / MU


def _a_law(samples_T: np.ndarray) -> np.ndarray:
    """As `_mu_law`, by F(x) = A |x| / (1 + ln A) up to 1 / A, and (1 + ln(A |x|)) / (1 + ln A) above."""
    whole, sizes_T = 1 + np.log(A), np.abs(samples_T)
    logarithm_T = np.log(np.maximum(A * sizes_T, 1))
    coded_T = _steps(np.where(sizes_T < 1 / A, A * sizes_T, 1 + logarithm_T) / whole) * whole
    return np.sign(samples_T) * np.where(coded_T < 1, coded_T, np.exp(np.maximum(coded_T, 1) - 1)) / A


def _steps(sizes_T: np.ndarray) -> np.ndarray:
    return np.round(np.clip(sizes_T, 0, 1) * 127) / 127


def _tilt(frequencies_W: np.ndarray, db_per_octave: float) -> np.ndarray:
    return 10 ** (np.float32(db_per_octave / 20) * np.log2(np.maximum(frequencies_W, 500) / 500))


def _envelope(waveform_T: np.ndarray) -> np.ndarray:
    """(T,) root mean square over 10 ms."""
    half = SAMPLING_RATE // 200
    sums = np.cumsum(np.pad(waveform_T.astype(np.float64) ** 2, (half + 1, half)))
    return np.sqrt(np.maximum(sums[2 * half + 1 :] - sums[: -2 * half - 1], 0) / (2 * half + 1)).astype(np.float32)


def _aspiration(size: int, rng: np.random.Generator) -> np.ndarray:
    """(T,) noise of rms 1 that rises by 6 dB per octave, as breath noise does relative to the voice."""
    return np.diff(rng.standard_normal(size + 1, dtype=np.float32)) / np.float32(np.sqrt(2))


def _band_noise(size: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """(T,) float32 noise of rms 1 between two frequencies in Hz."""
    whole = scipy.fft.next_fast_len(size, real=True)
    first, last = (max(1, round(edge * whole / SAMPLING_RATE)) for edge in (low, high))
    spectrum_W = np.zeros(last + 2, np.complex64)
    spectrum_W[first : last + 1] = np.exp(2j * np.pi * rng.random(last + 1 - first))
    noise_T = scipy.fft.irfft(spectrum_W, whole)[:size]
    return noise_T / max(_rms(noise_T), 1e-9)


def _frequencies(size: int) -> np.ndarray:
    """(W,) float32, Hz: the bins of the transforms by which `_filtered` filters ``size`` samples."""
    return scipy.fft.rfftfreq(_padded(size), 1 / SAMPLING_RATE).astype(np.float32)


def _padded(size: int) -> int:
    """The size of a transform with room for the longest response; the rest of longer ones is 60 dB down."""
    return int(scipy.fft.next_fast_len(size + int(0.8 * SAMPLING_RATE), real=True))


def _filtered(waveform_T: np.ndarray, gain_W: np.ndarray, response_R: np.ndarray | None = None) -> np.ndarray:
    """(T,) float32, filtered by a zero-phase gain and an impulse response."""
    whole = _padded(len(waveform_T))
    spectrum_W = scipy.fft.rfft(waveform_T, whole) * gain_W
    if response_R is not None and len(response_R) > 1:
        spectrum_W *= scipy.fft.rfft(response_R, whole)
    return scipy.fft.irfft(spectrum_W, whole)[: len(waveform_T)]


def _rms(waveform_T: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform_T, dtype=np.float64))))


def _held(waveform_T: np.ndarray) -> np.ndarray:
    """Scaled down to `PEAK`, not clipped."""
    return (waveform_T * min(1.0, PEAK / np.abs(waveform_T).max())).astype(np.float32)
