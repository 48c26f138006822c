"""What each augmentation does to speech, and what it costs: a picture and a table.

    python tests/benchmarks/augmentation.py > results/benchmarks/augmentation.md

The speech is the embedded synthetic corpus's, so that the picture is free to show.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from ser_ray.config import Audio, Augment
from ser_ray.corpora import synthetic
from ser_ray.models.logmel import LogMel
from ser_ray.speech import augment
from ser_ray.speech.audio import load_waveform

mpl.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path("results/benchmarks/augmentation.png")
WAYS = {
    "as it is": Augment(),
    "gain_db: 6": Augment(gain_db=6),
    "noise_snr_db: [10, 20]": Augment(noise_snr_db=(10, 20)),
    "speed: 0.1": Augment(speed=0.1),
    "crop_seconds: 1": Augment(crop_seconds=1),
    "channel_mask: 0.15": Augment(channel_mask=0.15),
    "time_mask: 0.15": Augment(time_mask=0.15),
}
DRAWS = 8
"""Seeds an utterance."""
SEED = 2
"""Of the picture: a draw whose speed is not the middle one."""


def level(waveform: np.ndarray) -> float:
    """RMS in dB."""
    return float(20 * np.log10(np.sqrt(np.mean(np.square(waveform)))))


def features(waveform: np.ndarray, settings: Augment) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel, masked as in training, and where a mask is."""
    plain, frames = LogMel(80)(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    masked = augment.mask(plain, frames, settings.channel_mask, settings.time_mask)
    return masked[0, :, : int(frames)], (masked != plain)[0, :, : int(frames)]


def row(name: str, settings: Augment, waveforms: list[np.ndarray]) -> str:
    """Levels, lengths, masked share and milliseconds a second of speech."""
    levels, lengths, hidden = [], [], []
    started = time.perf_counter()
    for number, waveform in enumerate(waveforms):
        for seed in range(DRAWS):
            varied = augment.augmented(waveform, f"synthetic/{number}", settings, seed)
            levels.append(level(varied) - level(waveform))
            lengths.append(len(varied) / len(waveform))
    seconds = time.perf_counter() - started
    for waveform in waveforms:
        hidden.append(float(features(waveform, settings)[1].float().mean()))
    audio = DRAWS * sum(len(waveform) for waveform in waveforms) / 16_000
    return (
        f"| `{name}` | {np.mean(levels):+.1f} ({np.min(levels):+.1f} to {np.max(levels):+.1f}) "
        f"| {np.min(lengths):.2f} to {np.max(lengths):.2f} | {np.mean(hidden):.3f} | {1000 * seconds / audio:.2f} |"
    )


def main() -> None:
    """Print the table as Markdown, draw the picture."""
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "synthetic"
        synthetic.make(corpus, speakers=4, repetitions=1)
        waveforms = [load_waveform(path, Audio()) for path in sorted(corpus.rglob("*.wav"))]
    torch.manual_seed(0)
    figure, axes = plt.subplots(len(WAYS), 1, figsize=(7, 12), layout="constrained")
    for axis, (name, settings) in zip(axes, WAYS.items(), strict=True):
        shown, _ = features(augment.augmented(waveforms[0], "synthetic/0", settings, SEED), settings)
        axis.imshow(shown, origin="lower", aspect="auto", cmap="magma")
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_yticks([])
    axes[-1].set_xlabel("frames of 10 ms; 80 mel bands, log energy")
    figure.savefig(PICTURE, dpi=55)
    print("# Augmentation\n\n```\npython tests/benchmarks/augmentation.py > results/benchmarks/augmentation.md\n```\n")
    print(f"{len(waveforms)} utterances of the synthetic corpus, {DRAWS} draws of each; one take below.\n")
    print("![One utterance, varied in each way](augmentation.png)\n")
    print("| `augment:` | level, dB: mean (range) | length, share | log-mel masked | ms a second of speech |")
    print("|---|---|---|---|---|")
    for name, settings in WAYS.items():
        print(row(name, settings, waveforms))


if __name__ == "__main__":
    main()
