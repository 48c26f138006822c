"""The reference experiment rehearsed: ``search_spaces/reference.yaml`` as shipped, from three corpora to its report.

    python tests/benchmarks/reference_rehearsal.py > results/benchmarks/reference_rehearsal.md
    python tests/benchmarks/reference_rehearsal.py --share 0.1   # tries the script itself, over a tenth of the names

CREMA-D, RAVDESS and TESS are stand-ins: every published file name at the published sampling rate, and about a second
of made-up speech in it. Its emotions are the rules of the embedded corpus (`ser_ray.corpora.synthetic`), spoken by a
formant voice in NumPy. Then the command runs, with only backbone, epochs, trials and paths overridden. A trial of
reference.yaml takes 4 CPUs and a GPU: where there is no GPU, one is declared to Ray, and the trials train on the CPU.
Overrides may follow the options; one of ``resources`` is obeyed in place of such a declaration.

Memory is the sum of the proportional set sizes of the command, of Ray, and of all their descendants, sampled every
`PERIOD` seconds. Where a stage ends is read from the files that it leaves. SCRATCH (--scratch) keeps the stand-ins,
which another run continues or finds, and a folder with the log and the results of every run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import soundfile
import soxr

from ser_ray.corpora import crema_d, ravdess, synthetic, tess
from ser_ray.evaluation.results import Results, read_results
from ser_ray.protocols.task import load_task
from ser_ray.schema import SPLITS

SPACE: Final = Path("search_spaces") / "reference.yaml"
PERIOD: Final = 5.0
DIRECTORIES: Final = {"crema_d": "CREMA-D", "ravdess": "RAVDESS", "tess": "TESS"}
RATES: Final = {"crema_d": 16_000, "ravdess": 48_000, "tess": 24_414}
"""Hz, as published."""
BACKBONES: Final = ("embedded/tiny-whisper", "embedded/tiny-wav2vec2")
EPOCHS: Final = 4
TRIALS: Final = 5

CREMA_D_ABSENT: Final = {
    *(f"1008_WSI_{emotion}_XX" for emotion in crema_d.EMOTIONS),
    *(f"1009_MTI_{emotion}_XX" for emotion in crema_d.EMOTIONS),
    *(f"1019_ITH_{emotion}_XX" for emotion in crema_d.EMOTIONS),
    "1002_TIE_NEU_XX",
    "1076_ITS_NEU_XX",
}
"""Of the grammar's 7462 names those that were not published: the gaps in the corpus's SentenceFilenames.csv."""
CREMA_D_MEN: Final = 48

TESS_FOLDERS: Final = {
    "OAF": ("angry", "disgust", "Fear", "happy", "neutral", "Pleasant_surprise", "Sad"),
    "YAF": ("angry", "disgust", "fear", "happy", "neutral", "pleasant_surprised", "sad"),
}
TESS_WORDS: Final = tuple(
    """
    back bar base bath bean beg bite boat bone book bought burn cab calm came cause chain chair chalk chat check cheek
    chief choice cool dab date dead death deep dime dip ditch dodge dog doll door fail fall far fat fit five food gap
    gas gaze germ get gin goal good goose gun half hall hash hate have haze hire hit hole home hurl hush jail jar join
    judge jug juice keen keep keg kick kill king kite knock late laud lean learn lease lid life limb live loaf long
    lore lose lot love luck make match merge mess met mill mob mode mood moon mop mouse nag name near neat nice note
    numb pad page pain pass pearl peg perch phone pick pike pole pool puff rag raid rain raise rat reach read red ring
    ripe road room rose rot rough rush said sail search seize sell shack shall shawl sheep shirt should shout size soap
    soup sour south sub such sure take talk tape team tell thin third thought thumb time tip tire ton tool tough turn
    vine voice void vote wag walk wash week wheat when which whip white wife wire witch yearn yes young youth
    """.split()  # noqa: SIM905 (two hundred words)
)
"""The four lists of Northwestern University Auditory Test No. 6 (Tillman and Carhart, 1966), which TESS speaks."""

VOWELS: Final = np.array(
    [[700, 1220, 2600], [530, 1840, 2480], [390, 1990, 2550], [270, 2290, 3010], [570, 840, 2410], [440, 1020, 2240]]
)
"""Hz, a man's first three formants (after Peterson and Barney 1952, J. Acoust. Soc. Am. 24, 175-184)."""
HIGHER: Final = (3500, 4500)
"""The two above, Hz: of all vowels."""
BANDWIDTHS: Final = np.array([80, 100, 140, 200, 260])
HOP: Final = 110
"""Samples, 5 ms at the voice's 22 050 Hz; a frame has four of them."""
FFT: Final = 512


# -- the stand-ins


def names(corpus: str) -> list[str]:
    """Every published file name of a corpus, below its directory."""
    if corpus == "crema_d":
        stems = [
            f"{actor}_{sentence}_{emotion}_{level}"
            for actor, sentence, emotion in itertools.product(crema_d.ACTORS, crema_d.SENTENCES, crema_d.EMOTIONS)
            for level in (("LO", "MD", "HI") if sentence == "IEO" and emotion != "NEU" else ("XX",))
        ]
        misspelt = {table: published for published, table in crema_d.MISSPELT.items()}
        return [f"AudioWAV/{misspelt.get(stem, stem)}.wav" for stem in stems if stem not in CREMA_D_ABSENT]
    if corpus == "ravdess":
        fields = itertools.product(ravdess.ACTORS, ravdess.EMOTIONS, ravdess.INTENSITIES, ravdess.STATEMENTS, (1, 2))
        return [
            f"Actor_{actor}/03-01-{emotion}-{intensity}-{statement}-{repetition:02}-{actor}.wav"
            for actor, emotion, intensity, statement, repetition in fields
            if (emotion, intensity) != ("01", "02")
        ]
    found = []
    for speaker, folders in TESS_FOLDERS.items():
        for folder, word in itertools.product(folders, TESS_WORDS):
            emotion = "ps" if "surprise" in folder else folder.lower()
            short = "OA" if (speaker, word, emotion) == ("OAF", "bite", "neutral") else speaker  # as published
            found.append(f"{speaker}_{folder}/{short}_{word}_{emotion}.wav")
    return found


def write(directory: Path, share: float = 1.0, processes: int = 1) -> int:
    """Write the stand-ins below ``directory``, a folder a corpus; files that are there already stay. Returns how many
    were written.

    ``share``: about so many of a corpus's names, which ones depends on the names alone. A file depends on its name
    alone too.
    """
    jobs = [
        (corpus, directory / folder, name)
        for corpus, folder in DIRECTORIES.items()
        for name in names(corpus)
        if zlib.crc32(name.encode()) < share * 2**32 and not (directory / folder / name).is_file()
    ]
    for folder in {(root / name).parent for _, root, name in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    with (directory / DIRECTORIES["crema_d"] / "VideoDemographics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("ActorID", "Sex"))
        writer.writerows((actor, "Male" if _is_man("crema_d", actor) else "Female") for actor in crema_d.ACTORS)
    if processes == 1:
        for job in jobs:
            _write_one(job)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(_write_one, jobs, chunksize=32):
                pass
    return len(jobs)


def speak(corpus: str, name: str) -> np.ndarray:
    """(T,) float64 at the corpus's rate: what stands in for a recording."""
    utterance = {"crema_d": crema_d, "ravdess": ravdess, "tess": tess}[corpus].parse(Path(name))
    actor = utterance.speaker.removeprefix(f"{corpus}/")
    speaker = synthetic.draw_speaker(1 + list(DIRECTORIES).index(corpus), _number(corpus, actor))
    random = np.random.default_rng(zlib.crc32(name.encode()))
    # RAVDESS's calm has no rule: half of sad.
    style = speaker.style["sad" if utterance.emotion == "calm" else utterance.emotion]
    intensity = {"low": 0.6, "high": 1.3, "strong": 1.3}.get(utterance.intensity or "", 1.0)
    intensity *= (0.5 if utterance.emotion == "calm" else 1.0) * random.uniform(*synthetic.INTENSITY)
    prosody = synthetic._scatter(style, intensity, synthetic.NOISE, random)
    voice = _voice(speaker, prosody, f"{corpus} {utterance.text_id}", random)
    waveform = synthetic._colour(voice, prosody, speaker.level + prosody.level, random)
    return soxr.resample(waveform, synthetic.RATE, RATES[corpus])


def _write_one(job: tuple[str, Path, str]) -> None:
    corpus, directory, name = job
    path = directory / name
    aside = path.with_name(f".{path.name}")
    soundfile.write(aside, speak(corpus, name), RATES[corpus], subtype="PCM_16", format="WAV")
    aside.rename(path)


def _is_man(corpus: str, actor: str) -> bool:
    if corpus == "crema_d":
        return (int(actor) - 1001) * CREMA_D_MEN % len(crema_d.ACTORS) < CREMA_D_MEN
    return corpus == "ravdess" and int(actor) % 2 == 1


def _number(corpus: str, actor: str) -> int:
    """Of the made-up person, who is a man where it is odd."""
    everyone = {"crema_d": crema_d.ACTORS, "ravdess": ravdess.ACTORS, "tess": tuple(TESS_FOLDERS)}[corpus]
    return 2 * everyone.index(actor) + _is_man(corpus, actor)


def _voice(
    speaker: synthetic.Speaker, prosody: synthetic.Prosody, text: str, random: np.random.Generator
) -> np.ndarray:
    """(T,) float64 at `synthetic.RATE`: three to five syllables, which the text decides, each a hiss and a vowel."""
    words = np.random.default_rng(zlib.crc32(text.encode()))
    count = int(words.integers(3, 6))
    vowels, hisses = words.integers(len(VOWELS), size=count), words.uniform(1500, 5500, size=count)
    seconds = 40 / (speaker.rate * 2**prosody.rate) * random.lognormal(0, 0.15, size=count)
    ends = np.cumsum(seconds)
    middles, starts = ends - seconds / 2, ends - seconds
    frames = int(ends[-1] * synthetic.RATE / HOP)
    when_F = np.arange(frames) * HOP / synthetic.RATE
    syllable_F = np.minimum(np.searchsorted(ends, when_F, side="right"), count - 1)
    within_F = (when_F - starts[syllable_F]) / seconds[syllable_F]

    semitones = speaker.range * 2**prosody.range * (random.uniform(-0.5, 0.5, count) + np.linspace(0.4, -0.4, count))
    semitones[-1] += 8 * (random.random() < prosody.rise)
    pitch_F = speaker.pitch * 2 ** ((prosody.pitch + np.interp(when_F, middles, semitones)) / 12)
    phase = np.cumsum(np.repeat(pitch_F, HOP)) / synthetic.RATE
    pulses = np.diff(np.floor(phase), prepend=0) + 0.003 * random.standard_normal(frames * HOP)

    tract = np.array(speaker.formants[:3]) / 100
    spoken = VOWELS[vowels] * tract * random.lognormal(0, 0.04, size=(count, 3))
    formants_F5 = np.column_stack(
        [*(np.interp(when_F, middles, row) for row in spoken.T), *(np.full(frames, hz * tract[2]) for hz in HIGHER)]
    )
    frequency = np.fft.rfftfreq(FFT, 1 / synthetic.RATE)
    resonance = 1 / (1 + ((frequency - formants_F5[..., None]) / BANDWIDTHS[:, None]) ** 2)
    vowel = resonance.sum(axis=1) / (1 + frequency / 300) * (np.sin(np.pi * np.clip(within_F, 0, 1)) ** 0.5)[:, None]
    hiss = np.exp(-(((frequency - hisses[syllable_F, None]) / 900) ** 2)) * (within_F < 0.2)[:, None]
    breath = 0.02 * random.standard_normal(frames * HOP)
    return _filtered(pulses, vowel) + _filtered(breath, hiss)


def _filtered(source: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(F * HOP,) by a gain (F, FFT // 2 + 1) that changes from frame to frame: overlap and add, a quarter apart."""
    window = np.hanning(4 * HOP)
    padded = np.pad(source, (0, 4 * HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 4 * HOP)[: len(source) : HOP] * window
    shaped = np.fft.irfft(np.fft.rfft(frames, FFT) * gain, FFT)[:, : 4 * HOP].reshape(len(gain), 4, HOP)
    out = np.zeros((len(gain) + 3, HOP))
    for quarter in range(4):
        out[quarter : quarter + len(gain)] += shaped[:, quarter]
    return out[: len(gain)].ravel()


# -- the run


class Memory(threading.Thread):
    """Samples of the proportional memory of this process and its descendants while the body runs: (time, GiB)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(PERIOD):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # gone meanwhile
                    continue
            self.samples.append((time.time(), total / 2**30))

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@dataclass(frozen=True)
class Ran:
    """A run of the command: what it was, what it printed, and when."""

    command: str
    lines: list[str]
    began: float
    ended: float
    memory: list[tuple[float, float]]
    """(time, GiB)"""


def overrides(corpora: Path, run: Path, backbones: Sequence[str], epochs: int, trials: int) -> list[str]:
    """All that differs from the file: backbones, epochs, trials and paths."""
    return [
        f"search.backbone={{choice: [{', '.join(backbones)}]}}",
        f"experiment.epochs={epochs}",
        f"tune.trials={trials}",
        *(f"experiment.corpora.{corpus}={corpora / folder}" for corpus, folder in DIRECTORIES.items()),
        f"storage.results={run / 'results'}",
        f"storage.cache={run / 'cache'}",
    ]


def run_command(arguments: Sequence[str], log: Path, declare_gpu: bool) -> Ran:
    """Run ``python -m ser_ray.tune`` and wait for it; its lines go to ``log`` and to stderr as they appear."""
    command = ["python", "-m", "ser_ray.tune", SPACE.as_posix(), *arguments]
    with _ray_with_a_gpu() if declare_gpu else _nothing() as environment, Memory() as memory:
        began, lines = time.time(), []
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                for target in (file, sys.stderr):
                    print(f"{time.time() - began:7.1f}  {lines[-1]}", file=target, flush=True)
        if process.wait() != 0:
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}; see {log}")
        return Ran(shlex.join(command), lines, began, time.time(), memory.samples)


@contextmanager
def _ray_with_a_gpu() -> Iterator[dict[str, str]]:
    """A Ray of this machine's cores, or 5 where it has fewer (4 of a trial, 1 for data), and a GPU that is none."""
    import ray

    from ser_ray.runtime import cluster

    port = cluster._free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)  # other Rays may run on this machine
    ray.init("local", num_cpus=max(5, os.cpu_count() or 1), num_gpus=1, include_dashboard=False, logging_level="ERROR")
    del os.environ["RAY_GCS_SERVER_PORT"]
    try:
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        ray.shutdown()


@contextmanager
def _nothing() -> Iterator[dict[str, str]]:
    yield {}


def stages(ran: Ran, run: Path, results: Path) -> dict[str, float]:
    """Stage -> when it ended: the time of the last file that it wrote, and what the search says of its beginning."""

    def last(paths: Iterable[Path]) -> float:
        return max((path.stat().st_mtime for path in paths), default=0.0)

    (session,) = json.loads((results / "sessions.json").read_text(encoding="utf-8"))
    audited = last([results / "audit.json"])
    ends = {
        "start, prepare": last((run / "cache" / "shards").glob("*/manifest.json")),
        "audit": audited,
        "cached features before the first trial": max(audited, datetime.fromisoformat(session["started"]).timestamp()),
        "search": last((results / "trials").glob("*/history.jsonl")),
        "evaluation": last([results / "evaluation" / "test.json"]),
        "report, end of the command": ran.ended,
    }
    assert list(ends.values()) == sorted(ends.values()), ends
    return ends


# -- the page


def page(ran: Ran, corpora: Path, run: Path, given: Sequence[str], writing: str) -> str:
    """The results page, in Markdown: every figure read from the folder, the clock or the lines that were printed."""
    (results,) = (run / "results").iterdir()
    found = read_results(results)
    packages = found.provenance["packages"]
    command = ran.command.replace(str(run), "RUN").replace(str(corpora), "CORPORA")
    script = shlex.join(["python", "tests/benchmarks/reference_rehearsal.py", *given])
    declared = "" if _has_gpu() or "resources." in command else " No GPU: one was declared to Ray."
    parts = [
        f"# The reference experiment, rehearsed\n\n```\n{script} > results/benchmarks/reference_rehearsal.md\n```\n",
        "`search_spaces/reference.yaml` over stand-ins of CREMA-D, RAVDESS and TESS: the published names and rates,\n"
        "made-up speech. What it ran:\n",
        f"```\n{command}\n```\n",
        f"{psutil.cpu_count()} cores ({platform.processor() or platform.machine()}), "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory.{declared}\n"
        f"torch {packages['torch']}, ray {packages['ray']}. Began {found.provenance['started']}.\n",
        "## The stand-ins\n",
        _stand_ins(corpora, found, writing),
        "What `prepare` and the audit printed:\n",
        "\n".join(["```", *_told(ran.lines), "```\n"]),
        "## Minutes and memory\n",
        _minutes(ran, run, results),
        "## What came out\n",
        _metrics(found),
        "## What it does not show\n",
        "The speech is synthetic and its emotions are the rules that made it: the figures say that the three corpora\n"
        "can be learned together and that no speaker of test was heard, nothing about people, about the corpora, or\n"
        "about the backbones that the file names. Those have 20 to 640 million weights, these two million: minutes\n"
        "and memory are those of everything around the model. Utterances last about a second, real ones two to four.\n",
    ]
    return "\n".join(parts)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _stand_ins(corpora: Path, found: Results, writing: str) -> str:
    hours = {data["corpus"]: data["hours"] for data in found.provenance["data"]}
    task = load_task(found.space.experiment, [Path(data["directory"]) for data in found.provenance["data"]])
    rows = ["| corpus | files | kHz | MB | hours, trimmed | train | dev | test |", "|---|---|---|---|---|---|---|---|"]
    ids, corpus_of = task.index["utterance_id"].to_pylist(), task.index["corpus"].to_pylist()
    counts = Counter((corpus, task.fold.splits[i]) for i, corpus in zip(ids, corpus_of, strict=True))
    for corpus, folder in DIRECTORIES.items():
        files = list((corpora / folder).rglob("*.wav"))
        size = sum(path.stat().st_size for path in files) / 1e6
        splits = " | ".join(str(counts[corpus, split]) for split in SPLITS)
        rows.append(
            f"| {folder} | {len(files)} | {RATES[corpus] / 1000:g} | {size:.0f} | {hours[corpus]:.2f} | {splits} |"
        )
    return "\n".join(rows) + f"\n\n{writing}\n"


def _told(lines: Sequence[str]) -> list[str]:
    """The lines on corpora, split and audit, without this machine's paths."""
    wanted = tuple(f"{corpus}: " for corpus in DIRECTORIES) + tuple(f"{corpus} differs " for corpus in DIRECTORIES)
    told = [line for line in lines if line.startswith((*wanted, "split: ", "audit ")) and "decoding" not in line]
    return [re.sub(r", in /\S+$", "", line) for line in told]


def _minutes(ran: Ran, run: Path, results: Path) -> str:
    rows = ["| stage | minutes | peak memory, GiB |", "|---|---|---|"]
    began = ran.began
    for stage, ended in stages(ran, run, results).items():
        own = [gib for when, gib in ran.memory if began <= when <= ended]
        rows.append(f"| {stage} | {(ended - began) / 60:.1f} | {f'{max(own):.1f}' if own else ''} |")
        began = ended
    peak = max((gib for _, gib in ran.memory), default=0.0)
    rows.append(f"| **together** | **{(ran.ended - ran.began) / 60:.1f}** | **{peak:.1f}** |")
    places = {"shards": run / "cache" / "shards", "cached features": run / "cache" / "prefix", "results": results}
    sizes = {name: _gigabytes(place) for name, place in places.items()}
    disk = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())
    return "\n".join(rows) + f"\n\nOn disk: {disk}.\n"


def _gigabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e9


def _metrics(found: Results) -> str:
    statuses = Counter(row["status"] for row in found.trials)
    epochs = sum(int(row["epochs"]) for row in found.trials)
    rows = [
        f"Trials: {len(found.trials)} ({', '.join(f'{n} {status}' for status, n in sorted(statuses.items()))}), "
        f"{epochs} epochs in all; chosen: {found.choice['trial_id']}.\n{found.test['protocol']['description']}.\n"
        f"95 % intervals: bootstrap over {found.test['ci95_unit']}.\n",
        "| | utterances | speakers | UAR | accuracy |",
        "|---|---|---|---|---|",
        *(_row(split, metrics) for split, metrics in (("dev", found.dev), ("test", found.test))),
    ]
    rows += [
        f"| test: {name} | | | {metrics['uar']:.3f} | {metrics['accuracy']:.3f} |"
        for name, metrics in found.test["baselines"].items()
    ]
    for corpus, metrics in found.test["per_corpus"].items():
        rows.append(f"| test of {corpus} | {metrics['n']} | | {metrics['uar']:.3f} | {metrics['accuracy']:.3f} |")
    return "\n".join(rows) + "\n"


def _row(split: str, metrics: Mapping[str, Any]) -> str:
    cells = (
        f"{metrics[m]:.3f} [{metrics['ci95'][m][0]:.3f}, {metrics['ci95'][m][1]:.3f}]" for m in ("uar", "accuracy")
    )
    return f"| {split} | {metrics['n']} | {len(metrics['per_speaker'])} | {' | '.join(cells)} |"


def main(given: Sequence[str]) -> None:
    """Write the stand-ins, run the command, print the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the published names")
    parser.add_argument("--scratch", type=Path, help="kept; default: a temporary directory")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="after --: more overrides of the file")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        corpora = scratch / f"corpora-{options.share:g}"
        corpora.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        count = write(corpora, options.share, len(os.sched_getaffinity(0)))
        writing = f"{count} of them written by this run, in {time.monotonic() - started:.0f} s."
        run = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
        arguments = overrides(corpora, run, options.backbones, options.epochs, options.trials) + options.overrides
        declare = not _has_gpu() and not any(text.startswith("resources.") for text in arguments)
        ran = run_command(arguments, run / "log", declare)
        print(page(ran, corpora, run, given, writing), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
