"""Whisper's log-mel spectrogram on the device of the model, at the true length of every utterance.

Equal to transformers' ``WhisperFeatureExtractor`` on the same audio padded to 30 s, without the frames of the padding.
There the silence after an utterance is transformed and encoded too: 85 % of the work for an utterance of 4 s.
"""

from __future__ import annotations

from typing import Any

import torch
import torchaudio
from torch import nn

from ser_ray.models.precision import in_fp32
from ser_ray.schema import SAMPLING_RATE

N_FFT = 400
HOP = 160
CHUNK_SAMPLES = 30 * SAMPLING_RATE
"""Whisper's longest input; its extractor zero-pads the signal up to this border, and reflects it there."""


class LogMel(nn.Module):
    """Waveforms -> normalised log-mel spectrograms (Radford et al. 2022, arXiv 2212.04356, section 2.2)."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLING_RATE,
            n_fft=N_FFT,
            hop_length=HOP,
            n_mels=num_mels,
            power=2.0,
            norm="slaney",
            mel_scale="slaney",
        )

    @in_fp32
    def forward(self, waveform_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B, T), zero beyond ``lengths_B`` samples -> features (B, mels, M) and mel frames (B,).

        Frames beyond an utterance's own are zero. Raises ValueError for utterances longer than 30 s.
        """
        longest = waveform_BT.shape[1]
        if longest > CHUNK_SAMPLES:
            raise ValueError(f"utterance of {longest / SAMPLING_RATE:.1f} s; Whisper's limit is 30 s")
        # Zeros after the longest utterance, so that its last frames are the same as in a longer batch.
        ends: Any = torch.sym_min(longest + N_FFT, CHUNK_SAMPLES)  # unlike min(), it is exported for any length
        padded_BT = nn.functional.pad(waveform_BT, (0, ends - longest))
        mel_BMF = self.mel(padded_BT)[..., :-1].clamp(min=1e-10).log10()
        # The floor is 8 below the utterance's own maximum; the silence after it has the lowest possible value.
        floor_B11 = mel_BMF.amax(dim=(1, 2), keepdim=True) - 8.0
        features_BMF = (torch.maximum(mel_BMF, floor_B11) + 4.0) / 4.0
        frames_B = (lengths_B + HOP - 1) // HOP
        own_BF = torch.arange(mel_BMF.shape[-1], device=mel_BMF.device) < frames_B[:, None]
        return (features_BMF * own_BF[:, None])[..., : (longest + HOP - 1) // HOP], frames_B
