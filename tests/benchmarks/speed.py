"""Speed on a CPU, each measure beside its alternative in the same run: results/benchmarks/speed.md and speed.json.

    python tests/benchmarks/speed.py RAVDESS WHISPER [--only SECTION ...] [--out DIRECTORY]

RAVDESS: the corpus's directory; WHISPER: a Whisper encoder's. The alternative to ours is what a user would run
otherwise: transformers' Trainer with PEFT (trainer.py), torch's DataLoader, the loop without Ray, the backbone without
a cache. Ours runs before and after a slow alternative, or all take turns, so that a busy machine slows both; what is
said is said on stderr as it comes. Under half an hour on two cores; a section that is run alone (``--only``) takes
its place among the others that are there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import gpu_cells
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import trainer
import transformers
from rich.console import Console

from ser_ray import config
from ser_ray import prepare as verb
from ser_ray.config import Experiment, SearchSpace
from ser_ray.disk import write_json, write_text
from ser_ray.evaluation import metrics
from ser_ray.evaluation.intervals import bootstrap_ci95, paired_gap
from ser_ray.models import prefix
from ser_ray.models.classifier import build
from ser_ray.protocols.task import Task, load_task
from ser_ray.runtime import cluster, feed, paths
from ser_ray.runtime.feature_cache import Extractor
from ser_ray.speech import cached_features, order, stream
from ser_ray.speech.audio import from_int16
from ser_ray.training import loop

SPACE: Final = Path(__file__).resolve().parents[2] / "search_spaces" / "ravdess_whisper.yaml"
QUIET: Final = Console(file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 (for the whole run)


@dataclass(frozen=True)
class Row:
    """One measure: ours beside the alternative, and how many times better."""

    measure: str
    ours: str
    alternative: str
    ratio: float
    aim: str
    notes: str = ""


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    corpus: Path
    backbone: Path
    scratch: Path

    def space(self, *overrides: str) -> SearchSpace:
        """The shipped RAVDESS space with a random head, as Trainer begins."""
        own = [
            f"experiment.corpora={{ravdess: {self.corpus}}}",
            f"experiment.backbone={self.backbone}",
            "experiment.head.init=random",
            f"storage.cache={self.scratch / 'cache'}",
            f"storage.results={self.scratch / 'results'}",
        ]
        return paths.resolve_paths(config.load(SPACE, [*own, *overrides]))

    def task(self, experiment: Experiment) -> Task:
        """The fold of the prepared speech."""
        return load_task(experiment, verb.prepare(self.space(), use_ray=False, console=QUIET))


# -- Whisper: LoRA in all layers, and in the upper half over a cache, against Trainer


def whisper(bench: Bench) -> Iterable[Row]:
    """Both start from random heads and take steps of about eight utterances; 160 of them, two epochs."""
    settings = (
        "experiment.optimizer={lr: 5.0e-4, head_lr: 1.0e-3}",
        "experiment.adapter={method: lora, rank: 8, alpha: 16, dropout: 0.05}",
        "experiment.head={layer_mix: weighted, pooling: statistics}",
        "experiment.class_weights=none",  # as Trainer
        "experiment.epochs=2",
        "experiment.batch_seconds=20",
    )
    experiment = bench.space(*settings).experiment
    task = bench.task(experiment)
    train, dev = (_rows(task, split, count) for split, count in (("train", 160), ("dev", 140)))
    first = _fit(experiment, train, dev)
    _fresh()
    theirs = trainer.run(experiment, _waveforms(train), _waveforms(dev), batch_size=8)
    _say("Trainer", theirs.utterances_per_s, theirs.dev_uar)
    second = _fit(experiment, train, dev)
    half = bench.space(*settings, "experiment.adapter.first_layer=2", "experiment.epochs=5").experiment
    upper = _fit_cached(half, train, dev, bench.scratch)
    rate = statistics.mean([first.rate, second.rate])
    labels = np.array(dev["label"].to_pylist())
    speakers = [i.split("-")[-1] for i in dev["utterance_id"].to_pylist()]
    gap = paired_gap(labels, second.predicted, theirs.dev_predicted, speakers, len(experiment.emotions))["uar"]
    ours_uar = _uar(experiment, labels, second.predicted, speakers)
    theirs_uar = _uar(experiment, labels, theirs.dev_predicted, speakers)
    yield Row(
        "Whisper, LoRA in all layers, utterances/s",
        f"{rate:.2f} ({first.rate:.2f} before, {second.rate:.2f} after), {second.memory:.0f} MB",
        f"{theirs.utterances_per_s:.2f}, {theirs.peak_memory_mb:.0f} MB (Trainer, batch 8, padded to 30 s)",
        rate / theirs.utterances_per_s,
        "12",
        f"dev UAR after {experiment.epochs} epochs: ours {ours_uar}, Trainer {theirs_uar}; "
        f"gap {gap.difference:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]",
    )
    yield Row(
        "the same, upper half adapted, prefix cached, over 5 epochs with making the cache",
        f"{upper.rate:.2f} (cache {upper.making:.1f} s, epochs {upper.seconds:.1f} s each), {upper.memory:.0f} MB",
        f"{theirs.utterances_per_s:.2f} (as above)",
        upper.rate / theirs.utterances_per_s,
        "20",
        f"dev UAR after 5 epochs {upper.uar:.3f}",
    )


# -- a head on the frozen backbone


def frozen(bench: Bench) -> Iterable[Row]:
    """Seconds an epoch over all of train, with and without the cache, for each pooling."""
    for pooling in ("statistics", "attentive"):
        head = f"experiment.head={{layer_mix: weighted, pooling: {pooling}}}"
        settings = ("experiment.adapter={method: frozen}", head, "experiment.optimizer.head_lr=1e-3")
        experiment = bench.space(*settings, "experiment.epochs=2").experiment
        task = bench.task(experiment)
        train, dev = (_rows(task, split, None) for split in ("train", "dev"))
        plain = _fit(experiment, train, dev)
        cached = _fit_cached(bench.space(*settings, "experiment.epochs=6").experiment, train, dev, bench.scratch)
        yield Row(
            f"a head on the frozen backbone (pooling {pooling}), seconds an epoch after the cache is made",
            f"{cached.seconds:.3f} (cache {cached.making:.0f} s, {cached.gigabytes:.2f} GB), {cached.memory:.0f} MB",
            f"{plain.seconds:.1f}, {plain.memory:.0f} MB (the same without the cache)",
            plain.seconds / cached.seconds,
            "100" if pooling == "statistics" else "",
            f"{train.num_rows} utterances; dev UAR after 2 epochs {plain.uar:.3f}, cached after 6 {cached.uar:.3f}",
        )


# -- wav2vec2-base


def wav2vec2(bench: Bench) -> Iterable[Row]:
    """Random weights in base's shape, 1 to 6 s of noise, LoRA in all layers; three ways in turn.

    Ours as the platform does it: what the convolutions compute is kept, here over three epochs with its making.
    """
    directory = bench.scratch / "wav2vec2-base"
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()).save_pretrained(directory)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(directory)
    utterances = gpu_cells.speech(32)
    described = gpu_cells.described({"method": "lora", "seconds": 28}, directory)
    experiment = described.model_copy(update={"epochs": 1, "patience": 1})
    longer = experiment.model_copy(update={"epochs": 3, "patience": 3})
    table = gpu_cells.as_table(utterances)
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "ours": lambda: _rate_of(_fit_cached(longer, table, table.slice(0, 2), bench.scratch)),
        "random": lambda: _rate(trainer.run(experiment, utterances, utterances[:2], batch_size=8)),
        "grouped": lambda: _rate(
            trainer.run(experiment, utterances, utterances[:2], batch_size=8, group_by_length=True)
        ),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(2):
        for name, way in ways.items():
            _fresh()
            found[name].append(way())
            _say("wav2vec2", name, *found[name][-1])
    rate = {name: statistics.mean(r for r, _ in runs) for name, runs in found.items()}
    memory = {name: max(m for _, m in runs) for name, runs in found.items()}
    for name, words, aim in (("random", "group_by_length off", "1.5"), ("grouped", "group_by_length on", "1.1")):
        yield Row(
            f"wav2vec2-base-sized, LoRA, convolutions kept, utterances/s over 3 epochs, against {words}",
            f"{rate['ours']:.2f}, {memory['ours']:.0f} MB",
            f"{rate[name]:.2f}, {memory[name]:.0f} MB (Trainer, batch 8)",
            rate["ours"] / rate[name],
            aim,
        )


# -- torch.compile


def compiled(bench: Bench) -> Iterable[Row]:
    """Whether compiling the blocks pays when every batch has another length: the same loop, 256 utterances."""
    experiment = bench.space("experiment.epochs=2", "experiment.class_weights=none").experiment
    task = bench.task(experiment)
    train, dev = (_rows(task, split, count) for split, count in (("train", 256), ("dev", 14)))
    plain = _fit(experiment, train, dev)
    compiled = _fit(experiment, train, dev, compile_blocks=True)
    yield Row(
        "torch.compile(dynamic=True) on every block, utterances/s over two epochs with compiling",
        f"{plain.rate:.2f} without (epochs {plain.seconds:.1f} s), {plain.memory:.0f} MB",
        f"{compiled.rate:.2f} with (epochs after the first {compiled.seconds:.1f} s), {compiled.memory:.0f} MB",
        plain.rate / compiled.rate,
        "",
        "left out" if plain.rate > compiled.rate else "it pays here",
    )


# -- Ray


def on_ray(bench: Bench) -> Iterable[Row]:
    """Epochs after the first, of two of RAVDESS's emotions, one thread each: on Ray (resident, streamed) and plain."""
    shared = [
        "experiment.emotions=[angry, happy]",
        "experiment.merge={}",
        "experiment.adapter={method: lora, rank: 8}",
        "experiment.epochs=3",
        "storage.prefix_gb=0",
        "tune.finalists=1",
    ]
    ways = {
        "resident": ["resources.data=resident"],
        "streamed": ["resources.data=streamed"],
        "plain": ["resources.workers=0"],
    }
    epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn, name in enumerate(("resident", "plain", "streamed", "resident", "plain")):
        overrides = [*shared, *ways[name], f"experiment.name={name}-{turn}"]
        space = bench.space(*overrides)
        _command("train", bench, overrides)
        path = space.results_dir() / "trials" / "single" / "history.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        epochs[name] += records[1:]
        _say(name, *[f"{record['seconds']:.1f}" for record in records])
    seconds = {name: statistics.median(r["seconds"] for r in records) for name, records in epochs.items()}
    memory = {name: max(record["peak_memory_mb"] for record in records) for name, records in epochs.items()}
    for name in ("resident", "streamed"):
        wait = statistics.median(record["input_wait"] for record in epochs[name])
        yield Row(
            f"steady-state epoch under TorchTrainer and Ray Data, {name}, seconds",
            f"{seconds[name]:.2f}, {memory[name]:.0f} MB",
            f"{seconds['plain']:.2f}, {memory['plain']:.0f} MB (the same loop in a plain process, the same Parquet)",
            seconds["plain"] / seconds[name],
            "0.95",
            f"input wait {wait:.2%} of the epoch (aim: under 3 %)",
        )


# -- the stream alone


def streams(bench: Bench) -> Iterable[Row]:
    """Hours of audio a second after the first batch, padded batches of float32, of RAVDESS's train speakers.

    The DataLoader has them in memory. What is streamed begins its next epoch meanwhile, as it does in training.
    """
    task = bench.task(bench.space().experiment)
    cluster.connect()
    hours = sum(task.durations("train")) / 3600
    rows = task.rows("train")
    speech = stream.Files(rows).hold().rows.select(["audio", "label"])
    examples = [(row["audio"], row["label"]) for row in speech.to_pylist()]
    windows = [order.epoch(rows, 40.0, (0, epoch)) for epoch in range(3)]

    def ours(resident: bool) -> float:
        streamed = feed.Streamed(rows, "audio")
        source: stream.Source = streamed
        if resident:
            source = feed.held(rows, feed.load_resident(task, ["train"], "audio")["train"].iterator())

        def epoch(number: int) -> float:
            read = source.read(windows[number], lambda: windows[number + 1])
            return _drain(stream.Prefetcher(b for table, packed in read for b in stream.batches(table, packed)))

        epoch(0)  # asked for once, as in a first epoch
        seconds = epoch(1)
        streamed.close()
        return seconds

    def loader(workers: int) -> float:
        return _drain(
            iter(
                torch.utils.data.DataLoader(
                    examples,
                    batch_size=16,
                    shuffle=True,
                    num_workers=workers,
                    collate_fn=_collate,  # type: ignore[arg-type]
                )
            )
        )

    ways: dict[str, Callable[[], float]] = {
        "ours, resident": lambda: ours(True),
        "ours, streamed": lambda: ours(False),
    } | {f"DataLoader, {n} workers": (lambda n=n: loader(n)) for n in (0, 1, 2)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    memory = dict.fromkeys(ways, 0.0)
    for _ in range(5):
        for name, way in ways.items():
            _fresh()
            found[name].append(hours / way())
            memory[name] = max(memory[name], loop._memory(torch.device("cpu"))["peak_memory_mb"])
    ray.shutdown()
    rate = {name: statistics.median(rates) for name, rates in found.items()}
    _say("stream", rate)
    best = max((r, name) for name, r in rate.items() if name.startswith("DataLoader"))
    for way in ("resident", "streamed"):
        yield Row(
            f"stream alone, {way}, hours of audio a second after the first batch",
            f"{rate[f'ours, {way}']:.2f}, {memory[f'ours, {way}']:.0f} MB",
            f"{best[0]:.2f}, {memory[best[1]]:.0f} MB ({best[1]}, the best of 0, 1 and 2)",
            rate[f"ours, {way}"] / best[0],
            "1" if way == "resident" else "",
        )


SECTIONS: Final[dict[str, Callable[[Bench], Iterable[Row]]]] = {
    "whisper": whisper,
    "frozen": frozen,
    "wav2vec2": wav2vec2,
    "compile": compiled,
    "ray": on_ray,
    "stream": streams,
}


def main(given: list[str]) -> None:
    """Run the sections one after the other and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    arguments = parser.parse_args(given)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.corpus.resolve(), arguments.backbone.resolve(), Path(scratch))
        for name in arguments.only:
            rows = []
            for row in SECTIONS[name](bench):
                _say(row)
                rows.append(row)
            _write(arguments.out, name, rows)


def _write(out: Path, section: str, rows: list[Row]) -> None:
    """Put a section's rows in place of those that were there; the others stay."""
    path = out / "speed.json"
    known = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.is_file() else {}
    known[section] = [asdict(row) | {"measured": time.strftime("%Y-%m-%d")} for row in rows]
    sections = {name: known[name] for name in SECTIONS if name in known}
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ray": ray.__version__,
    }
    write_json(path, {"machine": machine, "sections": sections})
    write_text(out / "speed.md", _page(machine, sections))


# -- below: how it is done


@dataclass(frozen=True)
class Fitted:
    """A run of our loop in this process."""

    rate: float
    """Utterances/s, in training; with a cache, its making shared among the epochs."""
    seconds: float
    """An epoch's training: the median after the first."""
    uar: float
    predicted: np.ndarray
    """Of dev, in the order of its rows."""
    memory: float
    making: float = 0.0
    gigabytes: float = 0.0


def _fit(
    experiment: Experiment,
    train: pa.Table,
    dev: pa.Table,
    fed: cached_features.Prefix | None = None,
    compile_blocks: bool = False,
) -> Fitted:
    _fresh()
    content = stream.SPEECH if fed is None else stream.Content(cached_features.COLUMN, fed.read)
    model = build(experiment)
    model.prefix = fed
    if compile_blocks:
        for layer in model.backbone.layers():
            layer.compile(dynamic=True)
    data = feed.data(experiment, stream.Held(train), stream.Held(dev), content)
    records: list[loop.Record] = []
    loop.fit(model, data, lambda record, save: records.append(record))
    guesses: dict[str, int] = {}
    for batch, logits_BK in loop.predict_batches(model, data.dev()):
        guesses.update(zip(batch.utterance_ids, logits_BK.argmax(-1).tolist(), strict=True))
    seconds = [record["seconds"] for record in records]
    return Fitted(
        train.num_rows * len(records) / sum(seconds),
        statistics.median(seconds[1:] or seconds),
        records[-1]["dev_uar"],
        np.array([guesses[i] for i in dev["utterance_id"].to_pylist()]),
        records[-1]["peak_memory_mb"],
    )


def _fit_cached(experiment: Experiment, train: pa.Table, dev: pa.Table, scratch: Path) -> Fitted:
    """What is frozen is computed first, as `ser-ray cache` does; train's share of that time counts."""
    fed = prefix.of(experiment, "fp32")
    extractor = Extractor(torch.get_num_threads(), gpus=0.0)
    parts, making, size = [], [], 0
    for name, table in (("train", train), ("dev", dev)):
        source, target = scratch / f"{name}.parquet", scratch / f"{name}.features.parquet"
        pq.write_table(table, source)
        started = time.perf_counter()
        extractor.extract(fed, source, target)
        making.append(time.perf_counter() - started)
        size += target.stat().st_size
        features = pq.read_table(target, columns=["utterance_id", cached_features.COLUMN])
        parts.append(stream.joined(table.drop_columns("audio"), [features]))
    fitted = _fit(experiment, parts[0], parts[1], fed)
    total = train.num_rows * experiment.epochs / fitted.rate + making[0]
    rate = train.num_rows * experiment.epochs / total
    own = asdict(fitted) | {"rate": rate, "making": sum(making), "gigabytes": size / 1e9}
    return Fitted(**own)


def _rows(task: Task, split: str, count: int | None) -> pa.Table:
    """``count`` utterances of a split, as many of every emotion as can be, with their speech."""
    rows, rng = task.rows(split), np.random.default_rng(0)
    label_N = rows["label"].to_numpy()
    mixed = [rng.permutation(np.flatnonzero(label_N == label)) for label in np.unique(label_N)]
    chosen = [own[n] for n in range(max(map(len, mixed))) for own in mixed if n < len(own)][:count]
    return stream.Files(rows.take(np.sort(chosen))).hold().rows.combine_chunks()


def _waveforms(table: pa.Table) -> list[trainer.Utterance]:
    audio = [from_int16(scalar.as_buffer()) for scalar in table["audio"]]
    return list(zip(audio, table["label"].to_pylist(), strict=True))


def _fresh() -> None:
    """From here on the process's peak memory is looked for anew (Linux: proc_pid_clear_refs)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _rate_of(fitted: Fitted) -> tuple[float, float]:
    return fitted.rate, fitted.memory


def _rate(outcome: trainer.Outcome) -> tuple[float, float]:
    return outcome.utterances_per_s, outcome.peak_memory_mb


def _uar(experiment: Experiment, labels: np.ndarray, predicted: np.ndarray, speakers: list[str]) -> str:
    emotions = len(experiment.emotions)
    low, high = bootstrap_ci95(labels, predicted, speakers, emotions)[0]["uar"]
    return f"{float(metrics.uar(metrics.confusion(labels, predicted, emotions))):.3f} [{low:.3f}, {high:.3f}]"


def _command(name: str, bench: Bench, overrides: list[str]) -> None:
    """A command in a process of its own, with one thread for torch."""
    base = [
        f"experiment.corpora={{ravdess: {bench.corpus}}}",
        f"experiment.backbone={bench.backbone}",
        "experiment.head.init=random",
        f"storage.cache={bench.scratch / 'cache'}",
        f"storage.results={bench.scratch / 'results'}",
    ]
    subprocess.run(
        [sys.executable, "-m", f"ser_ray.{name}", str(SPACE), *base, *overrides],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _collate(rows: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    waveforms = [torch.from_numpy(from_int16(audio)) for audio, _ in rows]
    return torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([label for _, label in rows])


def _drain(batches: Any) -> float:
    """Seconds for all batches but the first."""
    next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - started


def _page(machine: dict[str, Any], sections: dict[str, Any]) -> str:
    lines = [
        "# Speed, beside what a user would run otherwise",
        "",
        "```",
        "python tests/benchmarks/speed.py RAVDESS WHISPER",
        "```",
        "",
        f"{machine['cores']} cores ({machine['processor']}), torch {machine['torch']} on {machine['threads']} threads, "
        f"transformers {machine['transformers']}, ray {machine['ray']}, fp32.",
        "RAVDESS with whisper-tiny.en's encoder, EmoBox's first fold, seven emotions. MB: the largest resident size of",
        "the process during that run, with all that it had loaded before. The script says what each measure is. Both",
        "sides of a ratio come from one run of the command.",
        "",
        "| measure | ours | alternative | times better | aim | | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for section in sections.values() for row in section):
        row = row | {"ratio": f"**{row['ratio']:.2f}**"}
        cells = (row[name] for name in ("measure", "ours", "alternative", "ratio", "aim", "notes", "measured"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
