"""The log-mel front end against transformers' own extractor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backbone_fixtures import noise
from transformers import WhisperFeatureExtractor

from ser_ray.models.logmel import LogMel
from ser_ray.schema import SAMPLING_RATE

SECONDS = (0.3, 1.234, 7.0, 29.99, 30.0)


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("kind", ["white", "speech-like", "silent tail"])
def test_equals_the_extractor_on_true_frames(mels: int, kind: str) -> None:
    extractor, ours = WhisperFeatureExtractor(feature_size=mels), LogMel(mels)
    for seconds in SECONDS:
        waveform_BT, lengths_B = noise([seconds])
        if kind == "white":
            waveform_BT = torch.rand(waveform_BT.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        elif kind == "silent tail":  # the floor, 8 below the maximum, is what counts here
            waveform_BT[:, waveform_BT.shape[1] // 2 :] *= 1e-6
        features_BMF, frames_B = ours(waveform_BT, lengths_B)
        reference = extractor(waveform_BT[0].numpy(), sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        assert int(frames_B[0]) == int(np.ceil(int(lengths_B[0]) / 160)) == features_BMF.shape[-1]
        torch.testing.assert_close(features_BMF, reference[..., : features_BMF.shape[-1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("companion", [0.7, 12.0, 29.98, 30.0])
def test_features_do_not_depend_on_the_batch(companion: float) -> None:
    ours = LogMel(80)
    waveform_BT, lengths_B = noise([1.003, companion])
    both_BMF, frames_B = ours(waveform_BT, lengths_B)
    alone_BMF, _ = ours(waveform_BT[:1, : lengths_B[0]], lengths_B[:1])
    own = int(frames_B[0])
    torch.testing.assert_close(both_BMF[0, :, :own], alone_BMF[0], atol=1e-5, rtol=0)
    assert not torch.any(both_BMF[0, :, own:]), "frames beyond the utterance are silent"


def test_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="30 s"):
        LogMel(80)(torch.zeros(1, 30 * SAMPLING_RATE + 1), torch.tensor([30 * SAMPLING_RATE + 1]))
