"""A speaker's voice: what recordings without labels say of a speaker, and how a head uses it.

A voice is the number of a speaker's recordings, and the mean and the variance of their pooled vectors: numbers, no
audio. `SpeakerNorm` subtracts the mean from the pooled vector of another recording (`Head.speaker` center), and divides
by the deviation (standardize), because what a vector says of an emotion is how it differs from the speaker's others
(Sethu et al. 2007, "Speaker normalisation for speech-based emotion detection"; Busso et al. 2011, "Iterative feature
normalization for emotional speech detection").

The mean of a few recordings is a poor estimate, so it is shrunk towards that of the speakers of train: a voice counts
as if ``s`` further recordings were known, with the mean ``m`` and the variance ``v`` of an average speaker of train.
Of ``k`` recordings with the sum ``sum`` the mean is then ``(sum + s m) / (k + s)``. Without any recording it is ``m``;
as ``s`` approaches 0, the mean of one recording is that recording.

Shapes: B utterances or voices, P width of the pooled vector, N recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import nn

from ser_ray import config
from ser_ray.models.precision import in_fp32
from ser_ray.schema import is_known

SMALLEST: Final = 1e-6
"""Added to a variance before the root, as in `ser_ray.models.pooling`: a feature may be the same in all recordings."""


class Voice(NamedTuple):
    """The voices of B utterances' speakers: float64, because differences of sums are taken of them."""

    count_B: torch.Tensor
    """The number of recordings, k; 0 for a speaker of whom nothing is known."""
    mean_BP: torch.Tensor
    """Over the recordings; anything where there is none."""
    variance_BP: torch.Tensor
    """The mean squared deviation from the mean."""

    def at(self, rows: Sequence[int]) -> Voice:
        """The voices at ``rows``, in that order."""
        order = torch.as_tensor(rows, dtype=torch.int64)
        return Voice(self.count_B[order], self.mean_BP[order], self.variance_BP[order])


def voices_of(pooled_NP: torch.Tensor, recordings: Sequence[np.ndarray]) -> Voice:
    """A voice for each entry of ``recordings``, which are rows of ``pooled_NP`` in any order; of no rows, k is 0."""
    count_B = torch.tensor([len(rows) for rows in recordings], dtype=torch.float64)
    mean_BP = torch.zeros(len(recordings), pooled_NP.shape[-1], dtype=torch.float64)
    variance_BP = torch.zeros_like(mean_BP)
    for number, rows in enumerate(recordings):
        if len(rows):
            chosen = pooled_NP[torch.as_tensor(rows)].double()
            mean_BP[number], variance_BP[number] = chosen.mean(0), chosen.var(0, correction=0)
    return Voice(count_B, mean_BP, variance_BP)


def without(whole: Voice, part: Voice) -> Voice:
    """The voices of the recordings that are in ``whole`` and not in ``part``, which is among them: how an utterance is
    answered with all others of its speaker, at the cost of one subtraction."""
    count_B = whole.count_B - part.count_B
    n, k, rest = whole.count_B[:, None], part.count_B[:, None], count_B[:, None]
    mean_BP = (n * whole.mean_BP - k * part.mean_BP) / rest.clamp(min=1)
    squares_BP = n * whole.variance_BP - k * part.variance_BP
    squares_BP = squares_BP - (rest * k / n.clamp(min=1)) * (mean_BP - part.mean_BP).square()
    return Voice(count_B, mean_BP * (rest > 0), (squares_BP / rest.clamp(min=1)).clamp(min=0) * (rest > 0))


class Others:
    """The voice of all other recordings of a row's speaker, for rows of ``pooled_NP``; of speakers not known k is 0.

    ``recordings`` names what a row belongs to: rows of one recording, such as its windows, are never used for each
    other.
    """

    def __init__(self, pooled_NP: torch.Tensor, speakers: Sequence[str], recordings: Sequence[str]) -> None:
        of_speaker, of_recording = rows_by(speakers), rows_by(recordings)
        place = {name: number for number, name in enumerate(of_speaker)}
        self.pooled_NP, self.places = pooled_NP, [place[name] for name in speakers]
        self.whole = voices_of(pooled_NP, list(of_speaker.values()))
        self.own = [of_recording[name] for name in recordings]
        self.known = torch.tensor([is_known(name) for name in speakers])

    def at(self, rows: Sequence[int]) -> Voice:
        """The voices that ``rows`` are answered with."""
        part = voices_of(self.pooled_NP, [self.own[row] for row in rows])
        voices = without(self.whole.at([self.places[row] for row in rows]), part)
        return voices._replace(count_B=voices.count_B * self.known[list(rows)])


def rows_by(names: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of every name, in order of its first row: the order does not depend on the names."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {name: np.array(own) for name, own in rows.items()}


def average_speaker(pooled_NP: torch.Tensor, speakers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """m_P and v_P: the mean of the speakers' means, and of their variances; every speaker counts the same.

    The speakers of a corpus who are not known count as one.
    """
    voices = _of_speakers(pooled_NP, speakers)
    return voices.mean_BP.mean(0), voices.variance_BP.mean(0)


def between_speakers(pooled_NP: torch.Tensor, speakers: Sequence[str]) -> torch.Tensor:
    """The variance of the speakers' means, (P,); 0 for a single one."""
    return _of_speakers(pooled_NP, speakers).mean_BP.var(0, correction=0)


def _of_speakers(pooled_NP: torch.Tensor, speakers: Sequence[str]) -> Voice:
    named = [s if is_known(s) else s.partition("/")[0] for s in speakers]
    return voices_of(pooled_NP, list(rows_by(named).values()))


def relative(
    pooled_BP: torch.Tensor,
    average: tuple[torch.Tensor, torch.Tensor],
    voices: Voice | None,
    settings: config.Head,
) -> torch.Tensor:
    """``pooled_BP`` in relation to its speakers' shrunk means, and deviations with ``standardize``.

    ``average``: m_P and v_P. ``voices``: None if nothing is known of any speaker, which is the same as k = 0 for all.
    The variance is that of all k + s recordings about their common mean (module docstring).
    """
    mean, variance = (part.to(pooled_BP) for part in average)
    if voices is not None:
        count_B, mean_BP, variance_BP = (part.to(pooled_BP) for part in voices)
        share_B1 = (count_B / (count_B + settings.speaker_shrinkage))[:, None]
        between = share_B1 * (1 - share_B1) * (mean_BP - mean).square()
        variance = torch.lerp(variance, variance_BP, share_B1) + between
        mean = torch.lerp(mean, mean_BP, share_B1)  # exact at k = 0, and as s approaches 0
    centred_BP = pooled_BP - mean
    return centred_BP / (variance + SMALLEST).sqrt() if settings.speaker == "standardize" else centred_BP


class SpeakerNorm(nn.Module):
    """`relative` with the average speaker of train, which is saved with the head."""

    mean_P: torch.Tensor
    variance_P: torch.Tensor
    between_P: torch.Tensor
    """Of the means of train's speakers; for `distance` alone."""

    def __init__(self, settings: config.Head, width: int) -> None:
        super().__init__()
        self.settings = settings
        # The identity until `fit` is called.
        self.register_buffer("mean_P", torch.zeros(width))
        self.register_buffer("variance_P", torch.ones(width))
        self.register_buffer("between_P", torch.zeros(width))

    @in_fp32
    def forward(self, pooled_BP: torch.Tensor, voices: Voice | None = None) -> torch.Tensor:
        return relative(pooled_BP, (self.mean_P, self.variance_P), voices, self.settings)

    def fit(self, pooled_NP: torch.Tensor, speakers: Sequence[str]) -> None:
        """Set the average speaker to that of train."""
        mean_P, variance_P = average_speaker(pooled_NP, speakers)
        self.mean_P.copy_(mean_P)
        self.variance_P.copy_(variance_P)
        self.between_P.copy_(between_speakers(pooled_NP, speakers))

    @in_fp32
    def distance(self, pooled_BP: torch.Tensor, voices: Voice) -> torch.Tensor:
        """How far recordings are from voices, (B,): 1 on average for other recordings of the same speaker, more for
        those of another one.

        Squared, in deviations of an average speaker, and divided by what k recordings leave unknown of a mean. Features
        count by the square of the ratio of the variances between and within speakers: most tell emotions, or nothing.
        With a single speaker in train, nothing is known of that ratio, and the distance is 0.
        """
        count_B, mean_BP = (part.to(pooled_BP) for part in voices[:2])
        variance_P = self.variance_P + SMALLEST
        weight_P = (self.between_P / variance_P).square()
        weight_P = weight_P / weight_P.sum().clamp(min=torch.finfo(torch.float32).tiny)
        squared_B = ((pooled_BP - mean_BP).square() / variance_P) @ weight_P
        return squared_B / (1 + 1 / count_B)
