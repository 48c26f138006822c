"""Augmentation: nothing where it is off, the same for the same seed, and as strong as it says."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ser_ray.config import Augment
from ser_ray.models.logmel import LogMel
from ser_ray.speech import augment

RATE = 16_000


def tone(seconds: float = 1.0, pitch: float = 200.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def pitch_of(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * RATE / len(waveform))


EVERYTHING = Augment(gain_db=6, noise_snr_db=(10, 20), speed=0.1, crop_seconds=0.5)


def test_off_is_identity():
    assert np.array_equal(augment.augmented(tone(), "a/1", Augment(), 3), tone())


def test_it_depends_on_seed_and_utterance_alone():
    first = augment.augmented(tone(), "a/1", EVERYTHING, 3)
    assert np.array_equal(first, augment.augmented(tone(), "a/1", EVERYTHING, 3))
    for other in (augment.augmented(tone(), "a/2", EVERYTHING, 3), augment.augmented(tone(), "a/1", EVERYTHING, 4)):
        assert first.shape != other.shape or not np.allclose(first, other)


def test_one_setting_leaves_the_draws_of_the_others():
    quiet = augment.augmented(tone(), "a/1", Augment(gain_db=6), 0)
    both = augment.augmented(tone(), "a/1", Augment(gain_db=6, crop_seconds=0.5), 0)
    assert np.abs(both).max() == pytest.approx(np.abs(quiet).max(), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.floats(0, 20), width=st.floats(0, 20))
def test_the_noise_has_the_ratio_that_was_asked_for(seed, low, width):
    clean = tone()
    noise = augment.augmented(clean, "a/1", Augment(noise_snr_db=(low, low + width)), seed) - clean
    ratio = 10 * np.log10(np.square(clean).sum() / np.square(noise).sum())
    assert low - 0.05 <= ratio <= low + width + 0.05


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), gain=st.floats(0.1, 20))
def test_the_gain_is_within_its_bounds(seed, gain):
    level = np.abs(augment.augmented(tone(), "a/1", Augment(gain_db=gain), seed)).max() / 0.3
    assert -gain - 0.01 <= 20 * np.log10(level) <= gain + 0.01


def test_speed_moves_length_and_pitch_together():
    seen = set()
    for seed in range(12):
        varied = augment.augmented(tone(), "a/1", Augment(speed=0.1), seed)
        factor = RATE / len(varied)
        seen.add(round(factor, 2))
        assert pitch_of(varied) == pytest.approx(200 * factor, abs=2)
    assert seen == {0.9, 1.0, 1.1}


def test_a_crop_is_a_stretch_of_the_utterance():
    ramp = np.arange(RATE, dtype=np.float32) / RATE
    starts = set()
    for seed in range(20):
        cropped = augment.augmented(ramp, "a/1", Augment(crop_seconds=0.25), seed)
        assert len(cropped) == RATE // 4
        starts.add(float(cropped[0]))
        assert np.array_equal(cropped, ramp[round(float(cropped[0]) * RATE) :][: len(cropped)])
    assert len(starts) > 10
    assert np.array_equal(augment.augmented(ramp, "a/1", Augment(crop_seconds=2), 0), ramp)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), bands=st.floats(0, 0.5), stretch=st.floats(0, 0.5))
def test_masks_stay_within_an_utterance_and_its_share(seed, bands, stretch):
    torch.manual_seed(seed)
    features = torch.randn(3, 40, 60)
    frames = torch.tensor([60, 20, 7])
    masked = augment.mask(features, frames, bands, stretch)
    for row, own in enumerate(frames.tolist()):
        changed = masked[row] != features[row]
        assert not changed[:, own:].any()
        whole_bands, whole_frames = changed[:, :own].all(dim=1).sum(), changed[:, :own].all(dim=0).sum()
        assert whole_bands <= 2 * int(bands * 40)
        assert whole_frames <= 2 * int(stretch * own)
        inside = masked[row][changed]
        assert torch.allclose(inside, features[row, :, :own].mean().expand_as(inside))


def test_masks_are_drawn_anew_and_from_the_seed():
    features, frames = torch.randn(2, 40, 60), torch.tensor([60, 50])
    torch.manual_seed(0)
    one, other = (augment.mask(features, frames, 0.3, 0.3) for _ in range(2))
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    assert torch.equal(augment.mask(features, frames, 0.3, 0.3), one)


def chirps(factor: float, samples: int = RATE) -> np.ndarray:
    """Three tones that swell and fade over a second, played ``factor`` times as fast, from their formula."""
    time = np.arange(round(samples / factor)) * factor / RATE
    tones = sum(np.sin(2 * np.pi * pitch * time + pitch) for pitch in (180.0, 900.0, 3_000.0))
    return (0.2 * tones * np.sin(np.pi * np.clip(time * RATE / samples, 0, 1)) ** 2).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(0.7, 1.3))
@example(1 - 0.07)
@example(1 + 0.07)
@example(1.123)
def test_another_speed_is_the_same_sound_in_another_time(factor):
    found, expected = augment.at_speed(chirps(1.0), factor), chirps(round(factor, 3))
    assert abs(len(found) - RATE / factor) < 0.001 * RATE / factor + 1
    assert abs(len(found) - len(expected)) <= 1
    both = min(len(found), len(expected))
    np.testing.assert_allclose(found[:both], expected[:both], atol=2e-3)
    spectra = [np.abs(np.fft.rfft(wave[:both])) for wave in (found, expected)]
    assert np.abs(spectra[0] - spectra[1]).max() < 1e-3 * spectra[1].max()


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.001, 0.3))
@example(0.07)
def test_no_factor_needs_a_long_filter(share):
    """A resampler's filter grows with the terms of the reduced ratio: 14 879 : 16 000 took gigabytes."""
    asked = []

    def resample(waveform, rate, target):
        asked.append(Fraction(rate) / Fraction(target))
        return waveform

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment.soxr, "resample", resample)
        for seed in range(12):
            augment.augmented(tone(0.1), "a/1", Augment(speed=share), seed)
    assert asked
    for ratio in asked:
        assert max(ratio.numerator, ratio.denominator) <= 1300
        assert min(abs(float(ratio) - 1 - share), abs(float(ratio) - 1 + share)) <= 0.0005 + 1e-9


def test_a_slower_take_is_no_longer_than_whisper_takes():
    waveform = tone(29.0)
    lengths = {len(augment.augmented(waveform, "a/1", Augment(speed=0.1), seed)) for seed in range(12)}
    assert lengths == {round(29 * RATE / 1.1), 29 * RATE, 30 * RATE}
    longest = torch.from_numpy(augment.augmented(tone(30.0), "a/1", Augment(speed=0.3), 1))
    features, _ = LogMel(80)(longest[None], torch.tensor([len(longest)]))
    assert features.shape[-1] <= 3000
