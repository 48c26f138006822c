"""eGeMAPS: what openSMILE measures of tones that are known, where it is installed; and what is said where it is not."""

import builtins
import sys

import numpy as np
import pytest

from ser_ray.evaluation.egemaps import NUM_FEATURES, egemaps
from ser_ray.schema import SAMPLING_RATE, UserError


def _buzz(pitch: float, seconds: float = 1.5) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    return (0.05 * sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12))).astype(np.float32)


def test_without_opensmile_the_error_says_how_to_install_it_and_its_licence(monkeypatch):
    monkeypatch.setitem(sys.modules, "opensmile", None)  # an import raises ModuleNotFoundError
    with pytest.raises(UserError, match=r"pip install 'ser-ray\[baselines\]'.*non-commercial"):
        egemaps([_buzz(120)])


def test_a_broken_installation_is_no_missing_one(monkeypatch):
    real = builtins.__import__

    def broken(name, *rest, **more):
        if name == "opensmile":
            raise ModuleNotFoundError("No module named 'audinterface'", name="audinterface")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ModuleNotFoundError, match="audinterface"):
        egemaps([_buzz(120)])


def test_features_tell_the_pitch_and_the_loudness():
    opensmile = pytest.importorskip(
        "opensmile", reason="openSMILE is an optional extra, for non-commercial use: pip install 'ser-ray[baselines]'"
    )
    names = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals).feature_names
    pitches = (110.0, 220.0)
    waveforms = [_buzz(pitch) for pitch in pitches] + [0.1 * _buzz(110.0), np.zeros(SAMPLING_RATE, np.float32)]
    features = egemaps(waveforms)
    assert features.shape == (4, NUM_FEATURES)
    assert np.isfinite(features).all()
    semitones = features[:2, names.index("F0semitoneFrom27.5Hz_sma3nz_amean")]
    assert semitones == pytest.approx(12 * np.log2(np.array(pitches) / 27.5), abs=0.2)
    level = features[:, names.index("equivalentSoundLevel_dBp")]
    assert level[0] - level[2] == pytest.approx(20, abs=0.5)
    assert np.array_equal(features[1:2], egemaps(waveforms[1:2]))
    assert egemaps([]).shape == (0, NUM_FEATURES)
