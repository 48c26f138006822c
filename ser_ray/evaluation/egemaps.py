"""eGeMAPS: 88 acoustic features of an utterance; a linear SVM on them is a common baseline in papers.

Eyben et al. 2016, "The Geneva Minimalistic Acoustic Parameter Set (GeMAPS) for voice research and affective
computing". Computed by openSMILE, which is an optional extra: audEERING's research licence allows non-commercial use
only, not use in a commercial product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from ser_ray.schema import SAMPLING_RATE, UserError

NUM_FEATURES: Final = 88


def egemaps(waveforms: Iterable[np.ndarray], sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """The eGeMAPSv02 functionals of every utterance.

    Args:
        waveforms: N mono signals (T,), float, full scale 1.
        sampling_rate: of all waveforms [Hz].

    Returns:
        (N, 88) float32. A feature that an utterance lacks (pitch without voiced frames) is 0, as openSMILE returns it.

    Raises:
        UserError: openSMILE is not installed.
    """
    try:
        import opensmile
    except ModuleNotFoundError as missing:
        if missing.name != "opensmile":
            raise
        raise UserError(
            "eGeMAPS needs openSMILE, which is not installed: pip install 'ser-ray[baselines]' "
            "(audEERING's research licence: non-commercial use only)"
        ) from None
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    rows = [smile.process_signal(waveform, sampling_rate).to_numpy() for waveform in waveforms]
    features_NP = np.concatenate([np.zeros((0, NUM_FEATURES), np.float32), *rows])
    assert features_NP.shape[1] == NUM_FEATURES, features_NP.shape
    assert np.isfinite(features_NP).all(), "openSMILE returned NaN or infinite features"
    return features_NP
