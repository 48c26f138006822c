"""The audit of real corpora, and how well it finds versions of one take: false alarms, detection, cost.

    python tests/benchmarks/audit.py DATA > results/benchmarks/audit.md

DATA holds ``ravdess`` and ``emodb``. Every altered recording is written as a file and read as prepare does: altered
before trimming, so that what is trimmed differs as it would. Time is processor time of one thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ser_ray import audit, config
from ser_ray.config import Audio
from ser_ray.corpora import synthetic
from ser_ray.speech import fingerprint as fp
from ser_ray.speech import matching
from ser_ray.speech.audio import from_int16, load_waveform, to_int16
from ser_ray.terminal import PlainConsole

RATE = 16_000
EVERY = 8
"""Of RAVDESS's utterances, one in so many is altered in each way."""
MANY = 10_000

Waveforms = dict[str, np.ndarray]
rng = np.random.default_rng(0)


def coded(waveform: np.ndarray, container: str, subtype: str, **settings: float) -> np.ndarray:
    """Through a lossy codec and back."""
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE, format=container, subtype=subtype, **settings)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def telephone(waveform: np.ndarray) -> np.ndarray:
    """8 kHz and back."""
    return soxr.resample(soxr.resample(waveform, RATE, RATE // 2), RATE // 2, RATE)


def noisy(waveform: np.ndarray, snr_db: float) -> np.ndarray:
    """White noise, that far below the power of the whole recording."""
    noise = rng.standard_normal(len(waveform)).astype(np.float32)
    return waveform + noise * np.sqrt(np.mean(waveform**2)) * 10 ** (-snr_db / 20)


def cut(waveform: np.ndarray) -> np.ndarray:
    """0 to 300 ms less at each end of what prepare keeps."""
    start, end = (rng.uniform(0, 0.3, 2) * RATE).astype(int)
    return waveform[start : len(waveform) - end]


WAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "8 kHz and back": telephone,
    "0 to 300 ms cut from each end": cut,
    "12 dB softer": lambda x: x * 10 ** (-12 / 20),
    "12 dB louder, clipped": lambda x: np.clip(x * 10 ** (12 / 20), -1, 1),
    "MP3, usual quality": lambda x: coded(x, "MP3", "MPEG_LAYER_III"),
    "MP3, nearly the lowest quality": lambda x: coded(x, "MP3", "MPEG_LAYER_III", compression_level=0.9),
    "Ogg Vorbis": lambda x: coded(x, "OGG", "VORBIS"),
    "Ogg Opus": lambda x: coded(x, "OGG", "OPUS"),
    "white noise at 20 dB": lambda x: noisy(x, 20),
    "white noise at 10 dB": lambda x: noisy(x, 10),
    "cut, 6 dB softer, 8 kHz and back, MP3, noise at 20 dB": lambda x: noisy(
        coded(telephone(cut(x) / 2), "MP3", "MPEG_LAYER_III"), 20
    ),
    "10 % faster (no version that is looked for)": lambda x: soxr.resample(x, 11, 10),
}


def read(directory: Path) -> Waveforms:
    """Every recording as the shards hold it."""
    paths = sorted([*directory.rglob("*.flac"), *directory.rglob("*.wav")])
    return {path.stem: from_int16(to_int16(load_waveform(path, Audio()))) for path in paths}


def prints_of(waveforms: Waveforms) -> dict[str, np.ndarray]:
    """The fingerprint of each."""
    return {i: fp.fingerprint(waveform) for i, waveform in waveforms.items()}


def print_audit(space: Path, overrides: list[str], scratch: Path) -> None:
    """The command and what it says, without the folders."""
    out = io.StringIO()
    storage = [f"storage.cache={scratch}/cache", f"storage.results={scratch}/results", "resources.workers=0"]
    console = PlainConsole(file=out, width=100)
    audit.run(config.load(space, [*overrides, *storage]), console)
    lines = [
        line.rstrip() for line in out.getvalue().splitlines() if str(scratch) not in line and "decoding" not in line
    ]
    shown = " ".join(f"'{o}'" if " " in o else o for o in overrides)
    print(f"```\nser-ray audit {space} {shown}\n" + "\n".join(line for line in lines if line) + "\n```\n")


def nearest(prints: dict[str, np.ndarray]) -> list[matching.SameRecording]:
    """Pairs up to a difference of 0.3, with one agreeing landmark being enough: nearest first."""
    kept = matching.THRESHOLD, matching.VOTES
    matching.THRESHOLD, matching.VOTES = 0.3, 1
    found = sorted(matching.same_recordings(prints), key=lambda take: take.difference)
    matching.THRESHOLD, matching.VOTES = kept
    return found


def alarm_row(name: str, prints: dict[str, np.ndarray], said: Callable[[str], object], known: int) -> str:
    """What is found among takes that are all different, but for ``known`` pairs. ``said`` gives the speaker and the
    sentence of a recording's name."""
    hard = sum(n * (n - 1) // 2 for n in Counter(map(said, prints)).values())
    alarms = len(matching.same_recordings(prints)) - known
    closest = ", ".join(f"{take.difference:.3f}" for take in nearest(prints)[known : known + 3])
    pairs = len(prints) * (len(prints) - 1) // 2
    return f"| {name} | {len(prints)} | {pairs:,} | {hard:,} | {alarms} | {closest or 'none below 0.3'} |"


def detection_row(name: str, raw: Waveforms, prints: dict[str, np.ndarray], scratch: Path) -> str:
    """How many of the altered recordings are found as versions of their own take, and what else is."""
    altered: dict[str, np.ndarray] = {}
    for i, waveform in raw.items():
        path = scratch / f"{i}.wav"
        soundfile.write(path, WAYS[name](waveform), RATE, subtype="PCM_16")
        altered[f"{i} altered"] = from_int16(to_int16(load_waveform(path, Audio())))
    takes = matching.same_recordings(prints | prints_of(altered))
    own = [take.difference for take in takes if take.other == f"{take.one} altered"]
    doubles = {"03-01-03-01-02-01-07", "03-01-03-01-02-02-07"}
    wrong = [t for t in takes if t.other != f"{t.one} altered" and not doubles >= {t.one[:20], t.other[:20]}]
    metrics = f"{np.median(own):.3f} | {max(own):.3f}" if own else "- | -"
    return f"| {name} | {len(own)} of {len(raw)} | {len(wrong)} | {metrics} |"


def cost(waveforms: Waveforms) -> str:
    """Processor time for `MANY` utterances: RAVDESS at seven speeds, which are different takes to a fingerprint."""
    started = time.process_time()
    prints: dict[str, np.ndarray] = {}
    for step in range(-3, 4):
        for i, waveform in waveforms.items():
            prints[f"{i} {step}"] = fp.fingerprint(soxr.resample(waveform, 100, 100 + 6 * step) if step else waveform)
    made = time.process_time() - started
    prints = dict(list(prints.items())[:MANY])
    started = time.process_time()
    matching.same_recordings(prints)
    matched = time.process_time() - started
    hours = sum(len(p) for p in prints.values()) * fp.HOP / RATE / 3600
    size = sum(p.nbytes for p in prints.values()) / 1e6
    return (
        f"{len(prints)} utterances, {hours:.1f} h: {made * len(prints) / (7 * len(waveforms)):.0f} s to make the "
        f"fingerprints (kept beside the shards; with the resampling that makes this set), {matched:.1f} s to compare "
        f"them, {size:.0f} MB."
    )


def main() -> None:
    """Print all of it as Markdown."""
    data = Path(sys.argv[1])
    print("# The audit\n\n```\npython tests/benchmarks/audit.py DATA > results/benchmarks/audit.md\n```\n")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        print("## Two corpora\n")
        corpus = f"experiment.corpora={{ravdess: {data / 'ravdess'}}}"
        space = Path("search_spaces/ravdess_whisper.yaml")
        print_audit(space, [corpus], scratch)
        print_audit(space, [corpus, "experiment.protocol={scheme: random}"], scratch)
        emodb = [f"experiment.corpora={{emodb: {data / 'emodb'}}}", "experiment.merge={boredom: neutral}"]
        emotions = "experiment.emotions=[angry, disgust, fear, happy, neutral, sad]"
        print_audit(space, [*emodb, emotions, "experiment.protocol={scheme: speaker_kfold}"], scratch)
        synthetic.make(scratch / "synthetic")
        ravdess = read(data / "ravdess")
        prints = prints_of(ravdess)
        print("## False alarms\n")
        print("All pairs of every corpus; RAVDESS has one true double, which is found and not counted here.\n")
        print("| corpus | utterances | pairs | same sentence, same speaker | false alarms | closest pairs |")
        print("|---|---|---|---|---|---|")
        print(alarm_row("RAVDESS", prints, lambda i: (i[12:14], i[18:]), 1))
        print(alarm_row("EmoDB", prints_of(read(data / "emodb")), lambda i: i[:5], 0))
        print(
            alarm_row(
                "synthetic", prints_of(read(scratch / "synthetic")), lambda i: (i.split("_")[0], i.split("_")[2]), 0
            )
        )
        print(f"\nA pair is a version of one take up to a difference of {matching.THRESHOLD}.\n\n## Detection\n")
        picked = sorted((data / "ravdess").rglob("*.flac"))[::EVERY]
        raw = {path.stem: soundfile.read(path, dtype="float32")[0] for path in picked}
        print(f"{len(raw)} utterances of RAVDESS, altered, among all {len(prints)}.\n")
        print("| altered by | found | other pairs found | difference, median | largest |\n|---|---|---|---|---|")
        for way in WAYS:
            source = {i: ravdess[i] for i in raw} if "cut" in way else raw
            print(detection_row(way, source, prints, scratch), flush=True)
        print(f"\n## Cost\n\n{cost(ravdess)}")


if __name__ == "__main__":
    main()
