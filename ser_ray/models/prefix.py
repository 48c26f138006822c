"""The frozen part of a model as a function of an utterance: what is the same in every epoch and every trial.

With adapters from block k on, all below is a constant of the recording. `Prefix` says what of it training needs,
`compute` makes it, and an `EmotionClassifier` whose ``prefix`` is set takes it in place of waveforms:

    states   (F, S, D) fp16: the input of block k, with `head.layer_mix: weighted` the states below it as well
    moments  (M, D) fp32: where nothing of the backbone learns and pooling is plain, frames are not needed either

Moments: a head that mixes S states with weights w and pools mean and deviation over frames sees sum_l w_l mean_l and
sum_lm w_l w_m cov_lm, so the means of all states and their covariances (one row a pair) are all that it can ever ask
for: the same figures to rounding, from a hundredth of the bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from ser_ray.config import Experiment, fingerprint, to_dict
from ser_ray.models import backbones
from ser_ray.models.backbones import Backbone, frame_mask
from ser_ray.models.pooling import moments
from ser_ray.schema import UserError
from ser_ray.speech.stream import Batch, Content

FORMAT: Final = 1
"""Raised when `compute` gives something else; part of a cache's name."""
COLUMN: Final = "kept"
FRAMES_PER_SECOND: Final = 50
"""Of all four families: a frame each 20 ms."""


@dataclass(frozen=True)
class Prefix:
    """What is kept of every utterance; see the module's docstring."""

    backbone: str
    quantized: bool
    precision: str
    first_layer: int
    """Block k, whose input is the last state that is kept; the number of blocks where all are frozen."""
    num_states: int
    """S."""
    width: int
    """D."""
    moments: str | None
    """None: frames; else the pooling that they serve, mean or statistics."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of one frame, (S, D); or of the moments, (M, D)."""
        pairs = self.num_states * (self.num_states + 1) // 2
        return self.num_states + (pairs if self.moments == "statistics" else 0), self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """fp16 for frames: with 11 bits eight times closer than bf16, and no hidden state comes near its range."""
        return np.dtype(np.float32 if self.moments else np.float16)

    def gigabytes(self, seconds: float, utterances: int) -> float:
        """What a cache of so much speech takes."""
        rows = utterances if self.moments else seconds * FRAMES_PER_SECOND
        return rows * self.shape[0] * self.shape[1] * self.dtype.itemsize / 1e9

    def content(self) -> Content:
        """How `ser_ray.speech.stream.batches` reads it."""
        return Content(COLUMN, self.read)

    def read(self, buffer: pa.Buffer) -> np.ndarray:
        """Bytes -> (F, S, D), or (M, D)."""
        shape = self.shape if self.moments else (-1, *self.shape)
        return np.frombuffer(buffer, self.dtype).reshape(shape)

    def key(self) -> str:
        """The name of its cache: differs where anything differs that the values depend on."""
        return fingerprint(FORMAT, asdict(self), backbones.identity(self.backbone))


def why_not(experiment: Experiment) -> str | None:
    """Why an experiment has no frozen part that could be computed once; None where it has."""
    varied = sorted(key for key, value in to_dict(experiment.augment).items() if value)
    if varied:
        return f"augment.{varied[0]} varies what the frozen part sees"
    if experiment.adapter.method == "full" and experiment.adapter.first_layer == 0:
        return "every weight learns"
    return None


def of(experiment: Experiment, precision: str) -> Prefix:
    """The frozen part of an experiment's model, computed in ``precision`` (such as "fp32").

    Raises UserError where the backbone cannot be found.
    """
    assert (reason := why_not(experiment)) is None, reason
    config, _ = backbones.describe(experiment.backbone)
    frozen = experiment.adapter.method == "frozen"
    first = config.num_hidden_layers if frozen else experiment.adapter.first_layer
    plain = frozen and experiment.head.pooling in ("mean", "statistics")
    return Prefix(
        experiment.backbone,
        experiment.adapter.method == "qlora",
        precision,
        first,
        first + 1 if experiment.head.layer_mix == "weighted" else 1,
        config.hidden_size,
        experiment.head.pooling if plain else None,
    )


@torch.inference_mode()
def compute(prefix: Prefix, backbone: Backbone, batch: Batch) -> list[np.ndarray]:
    """What is kept of every utterance of a batch of waveforms, on the backbone's device.

    Raises UserError where a state exceeds what fp16 holds.
    """
    hiddens, mask_BF = backbone(batch.inputs, batch.lengths_B, stop=prefix.first_layer)
    kept = hiddens[-prefix.num_states :]
    if prefix.moments is not None:
        return list(moments(kept, mask_BF, covariances=prefix.moments == "statistics").cpu().numpy())
    states_BFSD = torch.stack(kept, dim=2).to(torch.float16).cpu()
    if not bool(torch.isfinite(states_BFSD).all()):
        raise UserError(f"backbone {prefix.backbone}: a hidden state exceeds fp16; set storage.prefix_gb to 0")
    frames_B = mask_BF.sum(1).tolist()
    return [row_FSD[:frames].numpy() for row_FSD, frames in zip(states_BFSD, frames_B, strict=True)]


def unpack(states_BFSD: torch.Tensor, frames_B: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Padded states -> S of (B, F, D) in fp32, and mask_BF."""
    mask_BF = frame_mask(frames_B, states_BFSD.shape[1])
    return [state.float() for state in states_BFSD.unbind(2)], mask_BF
