"""The training objectives of the embedded backbones: for each a small head, a loss, and its weight in the sum.

Shapes: B utterances, F frames, D width of the backbone, L + 1 hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from recipes.embedded.material import CONTOUR, NUMBERS, Batch
from recipes.embedded.speech import LANGUAGES, PHONES
from ser_ray.models.logmel import LogMel
from ser_ray.models.pooling.statistics import masked_statistics

WEIGHTS: Final = {
    "phones": 1.0,  # the sounds: alone it transferred best to real emotional speech (results/LOG.md)
    "contour": 0.5,  # pitch and loudness over time
    "mel": 0.5,  # the clean speech, without the noise and the masks
    "manner": 0.5,  # the numbers of the voice, which an emotion changes
    "language": 0.1,  # small: to retain sounds for more than one frame
}
"""All objectives, and the weights of their losses."""
NUM_MELS: Final = 80
MELS_A_FRAME: Final = 2


class Objectives(nn.Module):
    """The heads: ``phones`` on the last state, the others on the input of the last block.

    So the upper states encode the sounds, and a probe still finds the voice in the middle ones.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        assert set(names) <= WEIGHTS.keys(), names
        outputs = {
            "phones": (width, len(PHONES)),
            "contour": (width, len(CONTOUR)),
            "mel": (width, MELS_A_FRAME * NUM_MELS),
            "manner": (2 * width, len(NUMBERS)),
            "language": (2 * width, len(LANGUAGES)),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(*outputs[name]) for name in WEIGHTS if name in names})
        self.logmel = LogMel(NUM_MELS)

    def forward(self, hiddens: list[torch.Tensor], mask_BF: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The unweighted loss of every objective. ``hiddens``: L + 1 of (B, F, D), as `Backbone` gives them.

        A wav2vec2 has one frame fewer than the batch has targets; only frames that both have count.
        """
        frames = min(mask_BF.shape[1], batch.phones_BF.shape[1])
        mask_BF = mask_BF[:, :frames]
        states = {name: hiddens[-1 if name == "phones" else -2][:, :frames] for name in self.heads}
        losses = self._losses()
        return {name: losses[name](head, states[name], mask_BF, batch) for name, head in self.heads.items()}

    def _losses(self) -> dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor, Batch], torch.Tensor]]:
        return {
            "phones": _phones,
            "contour": _contour,
            "mel": self._mel,
            "manner": lambda head, hidden, mask, batch: nn.functional.smooth_l1_loss(
                head(masked_statistics(hidden, mask)), batch.numbers_BN
            ),
            "language": lambda head, hidden, mask, batch: nn.functional.cross_entropy(
                head(masked_statistics(hidden, mask)), batch.languages_B
            ),
        }

    def _mel(self, head: nn.Module, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean absolute error of the clean log-mel spectrum, of which two frames belong to each frame of the states."""
        mel_BMX, _ = self.logmel(batch.clean_BT, batch.lengths_B)
        frames = hidden_BFD.shape[1]
        target_BFO = mel_BMX[..., : frames * MELS_A_FRAME].transpose(1, 2).reshape(len(mel_BMX), frames, -1)
        return (head(hidden_BFD) - target_BFO).abs()[mask_BF].mean()


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """Their weighted sum."""
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


# -- below: how it is done


def _phones(head: nn.Module, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every frame. The start of every phone is known, so no alignment as in CTC is needed."""
    target_BF = batch.phones_BF[:, : hidden_BFD.shape[1]]
    return nn.functional.cross_entropy(head(hidden_BFD).float().flatten(0, 1), target_BF.flatten())


def _contour(head: nn.Module, hidden_BFD: torch.Tensor, mask_BF: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Absolute error of pitch on voiced frames and of energy on all, cross-entropy of voicing."""
    target_FC = batch.contour_BFC[:, : hidden_BFD.shape[1]][mask_BF]
    output_FC = head(hidden_BFD)[mask_BF].float()
    pitch, voiced, energy = target_FC.unbind(1)
    error = ((output_FC[:, 0] - pitch).abs() * voiced).sum() / voiced.sum().clamp(min=1)
    voicing = nn.functional.binary_cross_entropy_with_logits(output_FC[:, 1], voiced)
    return error + voicing + (output_FC[:, 2] - energy).abs().mean()
