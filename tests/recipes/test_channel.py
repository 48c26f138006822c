"""The manner and the channel: amounts measured in the sound, and nothing moved in time."""

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st

from recipes.embedded import channel
from ser_ray.schema import SAMPLING_RATE

NO_MANNER = dict.fromkeys(channel.MANNER, 0.0) | {"level": -30.0}


def voice_like(seconds=2.0, seed=0):
    """Pulses at 120 Hz in bursts, with pauses: (T,) float32."""
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    pulses = sum(np.cos(2 * np.pi * 120 * k * time) / k for k in range(1, 60))
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.05 * (pulses + 0.1 * noise) * (np.sin(2 * np.pi * 1.5 * time) > -0.5)).astype(np.float32)


def rms_db(waveform):
    return 10 * np.log10(np.mean(waveform.astype(float) ** 2))


def band_db(waveform, low, high):
    power = np.abs(np.fft.rfft(waveform)) ** 2
    frequencies = np.fft.rfftfreq(len(waveform), 1 / SAMPLING_RATE)
    return 10 * np.log10(power[(frequencies >= low) & (frequencies < high)].mean())


def spoken(seed=1, **manner):
    return channel._speak(voice_like(), NO_MANNER | manner, np.random.default_rng(seed))


@given(st.integers(0, 2**32), st.floats(0.3, 4))
def test_whatever_is_drawn_is_sound(seed, seconds):
    dry = voice_like(seconds)
    rendered = channel.render(dry, np.random.default_rng(seed))
    for waveform in (rendered.clean_T, rendered.waveform_T):
        assert waveform.shape == dry.shape
        assert waveform.dtype == np.float32
        assert np.isfinite(waveform).all()
        assert 0 < np.abs(waveform).max() < 1
    assert tuple(rendered.manner) == channel.MANNER
    assert all(type(amount) is float for amount in rendered.manner.values())
    assert rendered.manner["level"] == pytest.approx(rms_db(rendered.clean_T), abs=0.01)


def test_the_generator_decides_everything():
    one, same, other = (channel.render(voice_like(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.waveform_T.tobytes() == same.waveform_T.tobytes()
    assert one.manner == same.manner
    assert one.manner != other.manner


def test_manners_are_spread():
    rng = np.random.default_rng(0)
    drawn = {name: [] for name in channel.MANNER}
    for _ in range(400):
        for name, amount in channel._draw_manner(3.0, rng).items():
            drawn[name].append(amount)
    for name, (low, high) in {"tilt": (-4, 4), "slope": (-6, 6), "level": (-45, -15)}.items():
        assert low <= min(drawn[name]) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(drawn[name]) <= high
    for name, high in {"breath": 0.3, "tremor": 0.5, "creak": 0.6}.items():
        assert 0.8 * high < max(drawn[name]) <= high
        assert 0.4 < np.mean(np.array(drawn[name]) == 0) < 0.6


@pytest.mark.parametrize("tilt", [-4.0, 2.5])
def test_tilt_is_per_octave_above_500_hz(tilt):
    noise = np.random.default_rng(0).standard_normal(4 * SAMPLING_RATE).astype(np.float32)
    tilted = channel._speak(noise, NO_MANNER | {"tilt": tilt}, np.random.default_rng(0))

    def change(frequency):
        low, high = frequency * 0.98, frequency * 1.02
        return band_db(tilted, low, high) - band_db(noise, low, high)

    assert change(2000) - change(1000) == pytest.approx(tilt, abs=0.1)
    assert change(4000) - change(2000) == pytest.approx(tilt, abs=0.1)
    assert change(100) == pytest.approx(change(400), abs=0.1)


def test_breath_follows_the_voice():
    dry = voice_like()
    noise = spoken(breath=0.3) / channel._rms(spoken(breath=0.3)) - spoken() / channel._rms(spoken())
    silent = channel._envelope(dry) < 1e-4 * channel._envelope(dry).max()
    assert silent.any()
    assert rms_db(noise[silent]) < rms_db(noise[~silent]) - 40
    assert band_db(noise, 6000, 8000) > band_db(noise, 500, 1500) + 3


def test_tremor_and_creak_move_the_level_at_their_rates():
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * SAMPLING_RATE) / SAMPLING_RATE).astype(np.float32)
    for manner, low, high in (({"tremor": 0.3, "tremor_rate": 6.0}, 5.4, 6.6), ({"creak": 0.4}, 19, 51)):
        moved = channel._speak(tone, NO_MANNER | manner, np.random.default_rng(0))
        envelope = channel._envelope(moved)
        swing = np.abs(np.fft.rfft(envelope / envelope.mean() - 1)) ** 2
        rates = np.fft.rfftfreq(len(envelope), 1 / SAMPLING_RATE)
        assert swing[(rates >= low) & (rates <= high)].sum() > 0.7 * swing[rates < 100].sum()
        if "tremor" in manner:
            assert np.std(envelope / envelope.mean()) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


def test_slope_and_level():
    noise = np.random.default_rng(0).standard_normal(4 * SAMPLING_RATE).astype(np.float32)
    louder = channel._speak(noise, NO_MANNER | {"slope": 4.0, "level": -35.0}, np.random.default_rng(0))
    assert rms_db(louder) == pytest.approx(-35, abs=0.01)
    assert rms_db(louder[3 * SAMPLING_RATE :]) - rms_db(louder[:SAMPLING_RATE]) == pytest.approx(12, abs=0.3)


@pytest.mark.parametrize(("snr", "colour"), [(5.0, 0.0), (20.0, 1.0), (40.0, 2.0)])
def test_noise_has_its_level_and_colour(snr, colour):
    speech = voice_like(4)
    noise = channel._noise(speech, snr, colour, np.random.default_rng(0))
    assert rms_db(speech) - rms_db(noise) == pytest.approx(snr, abs=0.01)
    assert band_db(noise, 400, 800) - band_db(noise, 3200, 6400) == pytest.approx(colour * 3.01 * 3, abs=0.5)


@pytest.mark.parametrize("rt60", [0.2, 0.8])
def test_rooms_decay_and_start_with_the_direct_sound(rt60):
    response = channel._room(rt60, 6.0, np.random.default_rng(0))
    assert response[0] == 1
    assert 10 * np.log10(np.sum(response[1:] ** 2)) == pytest.approx(-6, abs=0.01)
    left = 10 * np.log10(np.cumsum(response[:0:-1] ** 2)[::-1])  # Schroeder's backward integration
    first, last = (int(share * rt60 * SAMPLING_RATE) for share in (0.1, 0.6))
    assert left[first] - left[last] == pytest.approx(30, abs=3)


def test_mu_law_is_that_of_g711():
    """Continuous G.711 in steps of 1/127 of the companded value, written another way."""
    samples = np.linspace(-1, 1, 2001)
    codes = np.round(127 * np.log(1 + 255 * np.abs(samples)) / np.log(256))
    expected = np.sign(samples) * (256 ** (codes / 127) - 1) / 255
    np.testing.assert_allclose(channel._mu_law(samples), expected, atol=1e-12)
    assert len(np.unique(channel._mu_law(np.linspace(-1, 1, 100_001)).round(9))) == 255


@pytest.mark.parametrize("law", [channel._mu_law, channel._a_law])
def test_companding_keeps_38_db_at_any_level(law):
    """About the signal-to-noise ratio of 8-bit G.711 for loud and for soft speech; 8 linear bits lose 30 dB of it."""
    time = np.arange(8000)
    for level in (0.9, 0.1, 0.05):
        tone = level * np.sin(time * 0.7)
        assert 33 < rms_db(tone) - rms_db(law(tone) - tone) < 42
    assert np.array_equal(np.sign(law(np.array([-0.5, 0.0, 0.5]))), [-1, 0, 1])
    steps = law(np.linspace(-1, 1, 5001))
    assert (np.diff(steps) >= 0).all()


def test_a_telephone_hears_nothing_above_4_khz():
    noise = (0.1 * np.random.default_rng(0).standard_normal(2 * SAMPLING_RATE)).astype(np.float32)
    for a_law in (False, True):
        heard = channel._telephone(noise, a_law)
        assert heard.shape == noise.shape
        assert band_db(heard, 4200, 8000) < band_db(heard, 500, 3000) - 60
        assert band_db(heard, 500, 3000) == pytest.approx(band_db(noise, 500, 3000), abs=0.2)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_moves_in_time(seed):
    """The largest correlation of what is heard with what was said is within a millisecond."""
    rendered = channel.render(voice_like(seed=seed), np.random.default_rng(seed))
    size = 2 * len(rendered.clean_T)
    product = np.fft.rfft(rendered.waveform_T, size) * np.fft.rfft(rendered.clean_T, size).conj()
    shift = int(np.argmax(np.abs(np.fft.irfft(product, size)[np.r_[-300:300]]))) - 300
    assert abs(shift) <= SAMPLING_RATE // 1000


def test_frame_energy():
    waveform = np.concatenate([np.full(320, 0.1), np.zeros(320), np.full(330, -1.0)]).astype(np.float32)
    energy = channel.frame_energy(waveform)
    assert energy.dtype == np.float32
    np.testing.assert_allclose(energy, [-20, -100, 0], atol=1e-3)


def test_a_telephone_does_not_delay():
    click = np.zeros(SAMPLING_RATE, np.float32)
    click[8000] = 0.5
    assert abs(int(np.argmax(np.abs(channel._telephone(click, False)))) - 8000) <= 2
    assert len(soxr.resample(click, SAMPLING_RATE, 8000)) == 8000
