"""Compute cached features: the output of a model's frozen part, which is the same in every epoch and every trial.

With adapters from block k on, everything below depends on the recording alone. `of` describes what an experiment needs
of it, `compute` computes it, and an `EmotionClassifier` whose ``prefix`` is set takes it in place of waveforms. The
format is that of `ser_ray.speech.cached_features`: states of frames, or their moments.
"""

from __future__ import annotations

import numpy as np
import torch

from ser_ray.config import Experiment
from ser_ray.models import heads, pretrained
from ser_ray.models.backbones import Backbone, frame_mask
from ser_ray.models.moments import moments
from ser_ray.schema import UserError
from ser_ray.speech.cached_features import Prefix
from ser_ray.speech.stream import Batch


def of(experiment: Experiment, precision: str) -> Prefix:
    """The frozen part of an experiment's model, computed in ``precision`` (such as "fp32").

    Raises UserError if the backbone cannot be found, or the head does not fit (`heads.of`).
    """
    config, _ = pretrained.describe(experiment.backbone)
    frozen = experiment.adapter.method == "frozen"
    first = config.num_hidden_layers if frozen else experiment.adapter.first_layer
    return Prefix(
        experiment.backbone,
        pretrained.identity(experiment.backbone),
        experiment.adapter.method == "qlora",
        precision,
        first,
        1 if experiment.head.layer_mix == "last" else first + 1,
        config.hidden_size,
        heads.of(experiment.head).moments(experiment.head) if frozen else None,
    )


@torch.inference_mode()
def compute(prefix: Prefix, backbone: Backbone, batch: Batch) -> list[np.ndarray]:
    """The cached features of every utterance of a batch of waveforms, in the shape and dtype of ``prefix``.

    Computed on the backbone's device. Raises UserError if a value is not finite, or exceeds the range of fp16.
    """
    hiddens, mask_BF = backbone(batch.inputs, batch.lengths_B, stop=prefix.first_layer, padded=batch.padded)
    needed = hiddens[-prefix.num_states :]
    if prefix.moments is not None:
        moments_BMD = moments(needed, mask_BF, covariances=prefix.covariances).cpu()
        if not bool(torch.isfinite(moments_BMD).all()):
            raise UserError(f"backbone {prefix.backbone}: its hidden states overflow; set precision to bf16 or fp32")
        arrays = list(moments_BMD.numpy())
    else:
        states_BFSD = torch.stack(needed, dim=2).to(torch.float16).cpu()
        frames_B = mask_BF.sum(1).tolist()
        rows = [row_FSD[:frames] for row_FSD, frames in zip(states_BFSD, frames_B, strict=True)]
        if not all(bool(torch.isfinite(row_FSD).all()) for row_FSD in rows):
            raise UserError(f"backbone {prefix.backbone}: a hidden state exceeds fp16; set storage.prefix_gb to 0")
        arrays = [row_FSD.numpy() for row_FSD in rows]
    for array in arrays:  # they are stored as bytes, and read with this dtype and shape
        assert (array.dtype, array.shape[-2:]) == (prefix.dtype, prefix.shape), (array.dtype, array.shape, prefix)
    return arrays


def unpack(states_BFSD: torch.Tensor, frames_B: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Padded states -> S of (B, F, D) in fp32, and mask_BF."""
    mask_BF = frame_mask(frames_B, states_BFSD.shape[1])
    return [state.float() for state in states_BFSD.unbind(2)], mask_BF
