"""A speech encoder and a head: recordings in, probabilities of emotions out, with transformers and torch alone.

This file is in every directory that ``ser-ray export --to hf`` writes, as it is. It imports nothing of ser_ray:

    from transformers import pipeline
    ask = pipeline("audio-classification", model=DIRECTORY, trust_remote_code=True)
    ask("call.wav")

What `ser-ray predict` does with a recording is done here too: one channel, 16 kHz, without the quiet ends, in equal
windows if it is long. With the packages soundfile and soxr the answers are the same; without them transformers decodes
and torchaudio resamples, which differ slightly for recordings of other rates than 16 kHz.

Shapes: B recordings or windows, T samples, F frames, D width of a state, P width of the pooled vector, K emotions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AudioClassificationPipeline,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    SequenceFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import ModelOutput

try:
    import soundfile
    import soxr
except ImportError:
    soundfile = soxr = None

SAMPLING_RATE = 16_000
SILENCE = 10 ** (-60 / 20)  # a peak below -60 dBFS
N_FFT, MEL_HOP, WHISPER_SAMPLES = 400, 160, 30 * SAMPLING_RATE
FRAME, HOP, MARGIN = 2048, 512, 800  # samples: of trimming, as librosa's; and what is left around the speech, 50 ms


class EmotionConfig(PretrainedConfig):
    """``encoder``: the configuration of the speech encoder, with its ``model_type``; the others describe the head."""

    model_type = "speech_emotion"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        normalize: bool = False,
        layer_mix: str = "last",
        pooling: str = "mean",
        hidden: int = 0,
        dropout: float = 0.0,
        speaker: str = "none",
        speaker_shrinkage: float = 1.0,
        logit_temperature: float = 1.0,
        max_samples: int = WHISPER_SAMPLES,
        checkpoint: str = "",
        **kwargs: Any,
    ) -> None:
        self.encoder = encoder or {"model_type": "wav2vec2"}
        self.normalize = normalize  # zero mean and unit variance of every waveform
        self.layer_mix, self.pooling, self.hidden, self.dropout = layer_mix, pooling, hidden, dropout
        self.speaker, self.speaker_shrinkage = speaker, speaker_shrinkage
        self.logit_temperature = logit_temperature  # what logits are divided by
        self.max_samples = max_samples  # of a window
        self.checkpoint = checkpoint  # whose voices (`ser-ray enrol`) this model understands
        super().__init__(**kwargs)


@dataclass
class EmotionOutput(ModelOutput):
    """``logits`` (B, K), whose softmax is the probabilities; ``embeddings`` (B, P), the pooled vectors."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None


class EmotionFeatureExtractor(SequenceFeatureExtractor):
    """Recordings of any rate -> ``input_values`` (B, T) at 16 kHz without their quiet ends, and ``attention_mask``."""

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012 (as transformers has it)

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = SAMPLING_RATE,
        padding_value: float = 0.0,
        trim_db: float | None = 40.0,
        min_seconds: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.trim_db, self.min_seconds = trim_db, min_seconds

    def __call__(
        self, raw_speech: Any, sampling_rate: int | None = None, return_tensors: str | None = None, **_: Any
    ) -> Any:
        """``raw_speech``: one recording (T,) of float in [-1, 1] or integers, or a list of them; all at
        ``sampling_rate``. Raises ValueError for what is no usable recording."""
        if sampling_rate is None:
            raise ValueError("say at which rate the recording is: sampling_rate=16000")
        several = isinstance(raw_speech, list | tuple) and len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        recordings = raw_speech if several or np.ndim(raw_speech) == 2 else [raw_speech]
        prepared = [self.prepare(np.asarray(one), sampling_rate) for one in recordings]
        return self.pad(
            {"input_values": prepared}, padding=True, return_attention_mask=True, return_tensors=return_tensors
        )

    def prepare(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """One recording as the model was trained on: (T,) float32."""
        if samples.ndim != 1 or samples.dtype.kind not in "fi" or not len(samples):
            raise ValueError(f"no recording of one channel: shape {samples.shape}, type {samples.dtype}")
        if samples.dtype.kind == "i":
            samples = samples / -float(np.iinfo(samples.dtype).min)
        samples = samples.astype(np.float32)
        _check_level(samples)  # before resampling, which makes a ripple of a constant
        if rate != SAMPLING_RATE:
            samples = _resampled(samples, rate)
            _check_level(samples)  # what is above 8 kHz is gone
        samples = samples / np.float32(max(1.0, np.abs(samples).max()))
        samples = samples[slice(*_speech_bounds(samples, self.trim_db))]
        if (seconds := len(samples) / SAMPLING_RATE) < self.min_seconds:
            raise ValueError(f"too short: {seconds:.2f} s without its quiet ends, less than {self.min_seconds:g} s")
        rounded: np.ndarray = np.clip(np.rint(samples * np.float32(32768)), -32768, 32767) / np.float32(32768)
        return rounded  # to 16 bit, as the recordings that the model was trained on


class Speaker(nn.Module):
    """The average speaker of training, and pooled vectors in relation to a speaker."""

    mean_P: torch.Tensor
    variance_P: torch.Tensor

    def __init__(self, config: EmotionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean_P", torch.zeros(width))
        self.register_buffer("variance_P", torch.ones(width))

    def forward(self, pooled_BP: torch.Tensor, voice: Mapping[str, Any] | None) -> torch.Tensor:
        """The vectors less the mean of their speaker, which is shrunk towards that of the average speaker."""
        mean_P, variance_P = self.mean_P.float(), self.variance_P.float()
        if voice is not None:
            known_P, spread_P = (torch.as_tensor(voice[name]).to(mean_P) for name in ("mean", "variance"))
            share = voice["recordings"] / (voice["recordings"] + self.config.speaker_shrinkage)
            between_P = share * (1 - share) * (known_P - mean_P).square()
            variance_P = torch.lerp(variance_P, spread_P, share) + between_P
            mean_P = torch.lerp(mean_P, known_P, share)
        centred_BP = pooled_BP - mean_P
        return centred_BP / (variance_P + 1e-6).sqrt() if self.config.speaker == "standardize" else centred_BP


class Head(nn.Module):
    """Hidden states -> pooled vector (`embed`) -> logits (`classify`); frames are normalised before they are mixed."""

    center_P: torch.Tensor
    scale_P: torch.Tensor

    def __init__(self, config: EmotionConfig, states: int, width: int) -> None:
        super().__init__()
        self.config = config
        states = 1 if config.layer_mix == "last" else states
        self.mix_L = nn.Parameter(torch.full((states,), 1 / states))
        if config.pooling == "attentive":
            self.score = nn.Sequential(nn.Linear(width, 128), nn.Tanh(), nn.Linear(128, 1, bias=False))
        pooled = width * (1 if config.pooling == "mean" else 2) * (states if config.layer_mix == "concat" else 1)
        self.register_buffer("center_P", torch.zeros(pooled))
        self.register_buffer("scale_P", torch.ones(pooled))
        self.speaker = Speaker(config, pooled) if config.speaker != "none" else None
        layers: list[nn.Module] = [nn.Dropout(config.dropout)]
        if config.hidden:
            layers += [nn.Linear(pooled, config.hidden), nn.GELU(), nn.Dropout(config.dropout)]
        self.classifier = nn.Sequential(*layers, nn.Linear(config.hidden or pooled, config.num_labels))

    def embed(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """States of one length, each (B, F, D) -> (B, P)."""
        normed = [functional.layer_norm(state.float(), state.shape[-1:]) for state in states]
        if self.config.layer_mix == "concat":
            return torch.cat([self._pool(state) for state in normed], -1)
        if self.config.layer_mix == "last":
            return self._pool(normed[-1])
        return self._pool(sum(state * weight for state, weight in zip(normed, self.mix_L, strict=True)))

    def classify(self, pooled_BP: torch.Tensor, voice: Mapping[str, Any] | None) -> torch.Tensor:
        """Pooled vectors, and what is known of their speaker -> logits (B, K)."""
        if self.speaker is not None:
            pooled_BP = self.speaker(pooled_BP, voice)
        scaled_BP = (pooled_BP - self.center_P) / self.scale_P
        logits_BK: torch.Tensor = self.classifier(scaled_BP.to(self.mix_L.dtype))
        return logits_BK.float() / self.config.logit_temperature

    def _pool(self, frames_BFD: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "mean":
            return frames_BFD.mean(1)
        weights_BF1 = torch.full_like(frames_BFD[..., :1], 1 / frames_BFD.shape[1])
        if self.config.pooling == "attentive":
            weights_BF1 = self.score(frames_BFD.to(self.mix_L.dtype)).float().softmax(1)
        mean_BD = (weights_BF1 * frames_BFD).sum(1)
        variance_BD = (weights_BF1 * (frames_BFD - mean_BD[:, None]).square()).sum(1)
        return torch.cat([mean_BD, (variance_BD + 1e-6).sqrt()], -1)


class EmotionForAudioClassification(PreTrainedModel):
    """Waveforms -> probabilities. A recording's answer does not depend on the others of its batch: those of one length
    are run together, without padding."""

    config_class = EmotionConfig
    main_input_name = "input_values"
    _supports_sdpa = True

    def __init__(self, config: EmotionConfig) -> None:
        super().__init__(config)
        encoder = CONFIG_MAPPING[config.encoder["model_type"]].from_dict(dict(config.encoder))
        whisper = encoder.model_type == "whisper"
        self.encoder = WhisperEncoder(encoder) if whisper else AutoModel.from_config(encoder)
        if whisper:
            self.register_buffer("mel_filters", torch.zeros(N_FFT // 2 + 1, encoder.num_mel_bins))
        self.head = Head(config, encoder.num_hidden_layers + 1, encoder.hidden_size)
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        voice: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> EmotionOutput:
        """``input_values`` (B, T) as the feature extractor prepares them, of any length; ``attention_mask`` (B, T) is 0
        on padding. ``voice``: what is known of the speaker of all recordings, the content of a file that
        ``ser-ray enrol`` writes (recordings, mean, variance). With ``labels`` (B,) there is a loss."""
        lengths = [input_values.shape[1]] * len(input_values)
        if attention_mask is not None:
            lengths = attention_mask.sum(1).tolist()
        pieces = [
            (row, window)
            for row, length in enumerate(lengths)
            for window in _windows(input_values[row, :length], self.config.max_samples)
        ]
        pooled = self._pooled([window for _, window in pieces], most=len(input_values))
        logits, embeddings = [], []
        for row in range(len(lengths)):
            own_WP = torch.stack([vector_P for (of, _), vector_P in zip(pieces, pooled, strict=True) if of == row])
            logits_WK = self.head.classify(own_WP, voice)
            # The probabilities of a long recording are the mean over its windows.
            logits.append(logits_WK[0] if len(logits_WK) == 1 else logits_WK.softmax(-1).mean(0).log())
            embeddings.append(own_WP.mean(0))
        logits_BK = torch.stack(logits)
        loss = None if labels is None else functional.cross_entropy(logits_BK, labels)
        return EmotionOutput(loss=loss, logits=logits_BK, embeddings=torch.stack(embeddings))

    def _pooled(self, windows: list[torch.Tensor], most: int) -> list[torch.Tensor]:
        """The pooled vector of every window; at most ``most`` of them, of one length, are run together."""
        vectors: dict[int, torch.Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            by_length.setdefault(len(window), []).append(number)
        for numbers in by_length.values():
            for first in range(0, len(numbers), most):
                group = numbers[first : first + most]
                states = self._states(torch.stack([windows[number] for number in group]).float())
                vectors |= dict(zip(group, self.head.embed(states), strict=True))
        return [vectors[number] for number in range(len(windows))]

    def _states(self, waveform_BT: torch.Tensor) -> list[torch.Tensor]:
        """The input of the encoder's first block and the output of every block, each (B, F, D)."""
        if isinstance(self.encoder, WhisperEncoder):
            return self._whisper_states(waveform_BT)
        if self.config.normalize:
            centred_BT = waveform_BT - waveform_BT.mean(1, keepdim=True)
            waveform_BT = centred_BT / (centred_BT.square().mean(1, keepdim=True) + 1e-7).sqrt()
        found = self.encoder(waveform_BT.to(self.dtype), output_hidden_states=True)
        return [*found.hidden_states[:-1], found.last_hidden_state]

    def _whisper_states(self, waveform_BT: torch.Tensor) -> list[torch.Tensor]:
        """Whisper's encoder at the true length of the recording: transformers' own always runs 30 s."""
        encoder = self.encoder
        hidden_BDF = functional.gelu(encoder.conv1(self._log_mel(waveform_BT).to(self.dtype)))
        hidden_BFD = functional.gelu(encoder.conv2(hidden_BDF)).transpose(1, 2).contiguous()
        states = [hidden_BFD + encoder.embed_positions.weight[: hidden_BFD.shape[1]]]
        for layer in encoder.layers:
            found = layer(states[-1], None)
            states.append(found[0] if isinstance(found, tuple) else found)
        return [*states[:-1], encoder.layer_norm(states[-1])]

    def _log_mel(self, waveform_BT: torch.Tensor) -> torch.Tensor:
        """(B, mels, F), as Whisper's feature extractor, without the frames of the silence that fills up 30 s there."""
        samples = waveform_BT.shape[1]
        padded_BT = functional.pad(waveform_BT, (0, min(samples + N_FFT, WHISPER_SAMPLES) - samples))
        window = torch.hann_window(N_FFT, device=padded_BT.device)
        spectrum_BNF = torch.stft(padded_BT, N_FFT, MEL_HOP, window=window, return_complex=True)[..., :-1]
        mel_BMF = self.mel_filters.float().T @ spectrum_BNF.abs().square()
        log_BMF = mel_BMF.clamp(min=1e-10).log10()
        log_BMF = torch.maximum(log_BMF, log_BMF.amax((1, 2), keepdim=True) - 8.0)
        return ((log_BMF + 4.0) / 4.0)[..., : -(-samples // MEL_HOP)]


class EmotionPipeline(AudioClassificationPipeline):
    """The pipeline ``audio-classification`` with all emotions, and recordings at their own rate: the feature extractor
    resamples them. ``voice``: a file that ``ser-ray enrol`` writes, or its content."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"top_k": None} | kwargs)

    def _sanitize_parameters(self, voice: Any = None, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, forward | ({} if voice is None else {"voice": self._read(voice)}), postprocess

    def preprocess(self, inputs: Any) -> Any:
        """A path, the content of a file, samples at 16 kHz, or a dict of samples (``raw`` or ``array``) and their
        ``sampling_rate``; two channels are averaged."""
        if isinstance(inputs, str | os.PathLike) and soundfile and os.path.isfile(inputs):  # noqa: PTH113
            inputs = _decoded(os.fspath(inputs)) or os.fspath(inputs)
        if isinstance(inputs, np.ndarray | torch.Tensor):
            inputs = {"raw": inputs, "sampling_rate": SAMPLING_RATE}
        if not isinstance(inputs, Mapping):
            return super().preprocess(inputs)  # by transformers' ffmpeg
        samples = inputs["raw"] if "raw" in inputs else inputs["array"]
        samples = samples.cpu().numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
        if samples.ndim == 2:
            samples = samples.mean(int(np.argmin(samples.shape)))  # there are fewer channels than samples
        return self.feature_extractor(samples, sampling_rate=inputs["sampling_rate"], return_tensors="pt")

    def _forward(self, model_inputs: Any, **kwargs: Any) -> Any:
        return self.model(**model_inputs, **kwargs)

    def _read(self, voice: Any) -> Mapping[str, Any]:
        content = voice
        if not isinstance(voice, Mapping):
            with open(voice, encoding="utf-8") as file:  # noqa: PTH123
                content = json.load(file)
        if self.model.config.speaker == "none":
            raise ValueError("this model does not use what is known of a speaker")
        if content.get("checkpoint") != self.model.config.checkpoint:
            raise ValueError("a voice of another model; enrol the speaker with the checkpoint that this one is of")
        return dict(content)


def _decoded(path: str) -> dict[str, Any] | None:
    """A file that soundfile reads; None for others, which are transformers' to decode."""
    try:
        samples_TC, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    return {"raw": samples_TC.mean(axis=1), "sampling_rate": rate}


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    if soxr is not None:
        resampled: np.ndarray = soxr.resample(samples, rate, SAMPLING_RATE, quality="HQ")
        return resampled
    from torchaudio.functional import resample

    found: np.ndarray = resample(torch.from_numpy(samples), rate, SAMPLING_RATE).numpy()
    return found


def _check_level(samples: np.ndarray) -> None:
    if not np.isfinite(samples).all() or _is_silent(samples):
        raise ValueError("silent: the peak is below -60 dBFS, or values are not finite")


def _is_silent(samples: Any) -> bool:
    """Without a constant offset, which a microphone that is off may give."""
    mean = float(samples.mean())
    return max(float(samples.max()) - mean, mean - float(samples.min())) < SILENCE


def _speech_bounds(samples: np.ndarray, trim_db: float | None) -> tuple[int, int]:
    """The first sample between the quiet ends, and that after the last: frames within ``trim_db`` of the loudest."""
    if trim_db is None:
        return 0, len(samples)
    filled = np.concatenate((samples, np.zeros(-len(samples) % HOP, np.float32))).reshape(-1, HOP)
    energies = np.einsum("ht,ht->h", filled, filled)
    hops = FRAME // HOP
    padded = np.zeros(len(samples) // HOP + hops, np.float32)
    padded[hops // 2 : hops // 2 + len(energies)] = energies
    power = np.maximum(np.convolve(padded, np.ones(hops, np.float32), mode="valid") / FRAME, 1e-10)
    loud = np.flatnonzero(10 * np.log10(power / power.max()) > -trim_db)
    end = min(int(loud[-1] + 1) * HOP, len(samples))
    return max(0, int(loud[0]) * HOP - MARGIN), min(end + MARGIN, len(samples))


def _windows(samples: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Equal windows of at most ``most`` samples; of several the silent ones are left out, if not all are silent."""
    windows = list(torch.tensor_split(samples, -(-len(samples) // most)))
    return [window for window in windows if len(windows) == 1 or not _is_silent(window)] or windows
