"""Batches of augmented speech with targets, for the training of the embedded backbones.

A step's batch depends on the seed and the step's number alone, so a continued training gets the same batches as an
uninterrupted one. Shapes: B utterances, T samples, F frames of 20 ms.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recipes.embedded import channel
from recipes.embedded.speech import FRAMES, LANGUAGES, Speech, Spoken

FRAME: Final = channel.FRAME
SECONDS: Final = (2.24, 5.6)
"""The longest crop, in whole frames. Even steps: long enough for a few words and a contour. Odd steps, which have half
as many crops: mostly whole utterances, so that a Whisper is trained on later positions."""
CONTOUR: Final = ("pitch", "voiced", "energy")
"""Per frame: octaves from `MIDDLE`, 0 if unvoiced; 1 or 0; dB of the clean speech, standardised as `NUMBERS` level."""
MIDDLE: Final = 160.0
"""Hz: the middle pitch of the generated speech."""
NUMBERS: Final = {
    "pitch": (0.0, 0.6),  # octaves from `MIDDLE`: mean over the crop's voiced frames
    "liveliness": (0.2, 0.15),  # octaves: their standard deviation
    "swing": (8.0, 4.0),  # dB: standard deviation of the energy of frames
    "rate": (7.4, 0.35),  # log2 of words per minute
    "tract": (105.0, 10.0),  # percent
    "tilt": (0.0, 2.3),  # from here on: see `channel.MANNER`
    "breath": (0.08, 0.1),
    "tremor": (0.12, 0.16),
    "creak": (0.15, 0.2),
    "slope": (0.0, 3.5),
    "level": (-30.0, 8.7),
}
"""The numbers that describe an utterance: approximate mean and standard deviation, which standardise the targets."""
NO_FRAME: Final = -100
"""The phone of a frame beyond the end: torch's cross-entropy ignores it."""


@dataclass(frozen=True)
class Batch:
    """B crops and their targets."""

    waveform_BT: torch.Tensor
    """float32, after the channel; zero beyond ``lengths_B``."""
    lengths_B: torch.Tensor
    clean_BT: torch.Tensor
    """float32: before the channel."""
    phones_BF: torch.Tensor
    """int64, indices into `speech.PHONES`; `NO_FRAME` beyond the end."""
    contour_BFC: torch.Tensor
    """float32, `CONTOUR`."""
    numbers_BN: torch.Tensor
    """float32, standardised `NUMBERS`."""
    languages_B: torch.Tensor
    """int64, indices into `speech.LANGUAGES`."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Material(Dataset[Batch]):
    """Step number -> its batch; for `batches`, and for inspection."""

    speech: Speech
    seed: int
    size: int

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step, 3])
        size, seconds = (max(1, self.size // 2), SECONDS[1]) if step % 2 else (self.size, SECONDS[0])
        return _collate([_draw(self.speech, seconds, rng) for _ in range(size)])


def batches(
    directory: Path, seed: int, size: int, steps: range, workers: int = 0, parts: int | None = None
) -> Iterator[Batch]:
    """The batches of these steps, prefetched by ``workers`` processes (0: this one); their number changes no batch.

    ``parts``: see `Speech`. Raises UserError where the directory holds no speech.
    """
    loader = DataLoader(
        Material(Speech(directory, parts), seed, size),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        worker_init_fn=_begin,
        multiprocessing_context="fork" if workers else None,  # workers inherit the open files of `Speech`
        prefetch_factor=8 if workers else None,
    )
    yield from loader


# -- below: how it is done

_Crop = tuple[np.ndarray, ...]


def _begin(worker: int) -> None:
    """Use one thread; ignore Ctrl-C, which reaches every process of a terminal: the training process handles it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _draw(speech: Speech, seconds: float, rng: np.random.Generator) -> _Crop:
    """One crop with its targets, in the order of `Batch` without the lengths; silent ones are drawn again."""
    while True:
        spoken = speech[int(rng.integers(len(speech)))]
        most = round(seconds * FRAMES)
        first = int(rng.integers(max(1, len(spoken.f0_F) - most + 1)))
        frames = slice(first, min(len(spoken.f0_F), first + most))
        dry_T = spoken.waveform_T[frames.start * FRAME : frames.stop * FRAME]
        if np.abs(dry_T).max() > 0.01:  # a crop may fall into a pause
            return _targets(spoken, frames, channel.render(dry_T, rng))


def _targets(spoken: Spoken, frames: slice, rendered: channel.Rendered) -> _Crop:
    places_F = np.searchsorted(spoken.phone_frames, np.arange(frames.start, frames.stop), side="right") - 1
    f0_F = spoken.f0_F[frames]
    octaves_F = np.where(f0_F > 0, np.log2(np.maximum(f0_F, 1) / MIDDLE), 0)
    energy_F = channel.frame_energy(rendered.clean_T)
    mean, deviation = NUMBERS["level"]
    contour_FC = np.stack([octaves_F, f0_F > 0, (energy_F - mean) / deviation], axis=1)
    voiced = octaves_F[f0_F > 0] if (f0_F > 0).any() else np.zeros(1)
    numbers = {
        **spoken.numbers,
        **rendered.manner,
        "pitch": float(voiced.mean()),
        "liveliness": float(voiced.std()),
        "swing": float(np.maximum(energy_F, energy_F.max() - 40).std()),
    }
    standard_N = np.array([(numbers[name] - mean) / deviation for name, (mean, deviation) in NUMBERS.items()])
    language = int(spoken.numbers["language"])
    assert 0 <= language < len(LANGUAGES), language
    return (
        rendered.waveform_T,
        rendered.clean_T,
        spoken.phones[places_F],
        contour_FC.astype(np.float32),
        standard_N.astype(np.float32),
        np.array(language),
    )


def _collate(crops: list[_Crop]) -> Batch:
    recorded, clean, phones, contours, numbers, languages = zip(*crops, strict=True)
    return Batch(
        waveform_BT=_padded(recorded),
        lengths_B=torch.tensor([len(one) for one in recorded]),
        clean_BT=_padded(clean),
        phones_BF=_padded(phones, NO_FRAME),
        contour_BFC=_padded(contours),
        numbers_BN=torch.from_numpy(np.stack(numbers)),
        languages_B=torch.from_numpy(np.stack(languages)),
    )


def _padded(rows: tuple[np.ndarray, ...], value: float = 0) -> torch.Tensor:
    tensors = [torch.from_numpy(np.ascontiguousarray(row)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
