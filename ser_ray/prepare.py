"""Corpora -> shards of checked speech, with Ray Data: ``ser-ray prepare SPACE.yaml [key=value ...]``.

One directory of shards a corpus, under ``storage.cache``, named by a fingerprint of everything it is made from: files,
labels, audio settings. A second run finds it and does nothing; a changed input makes another directory. Recordings
are decoded in chunks; a chunk writes its own shard and then a note of what it rejected, so that a run that was cut off
goes on where it stopped, a retried task overwrites what it left, and two runs at once write the same bytes. The
manifest comes last and alone declares the directory whole.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["prepare", *sys.argv[1:]]))

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import ray.data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ser_ray import cluster, config, corpora
from ser_ray.corpora import synthetic
from ser_ray.disk import write_json
from ser_ray.schema import SAMPLING_RATE, Rejected, UserError, Utterance
from ser_ray.speech import shards
from ser_ray.speech.audio import Unusable, load_waveform, to_int16

CHUNK: Final = 64
"""Utterances a task and a shard: 6 MB of 3 s each, at most 60 MB; seconds of work, which is what a retry costs."""

CHUNK_SCHEMA: Final = pa.schema([("shard", pa.string()), *((field.name, pa.string()) for field in fields(Utterance))])


def main(arguments: list[str]) -> int:
    """The command: prepare every corpus of a search space."""
    path, *overrides = arguments or [str(config.default_space())]
    prepare(cluster.settle_paths(config.load(path, overrides)))
    return 0


def prepare(space: config.SearchSpace, use_ray: bool = True, console: Console | None = None) -> list[Path]:
    """Make sure that every corpus of the experiment is there as shards; returns their directories, one a corpus.

    With ``use_ray`` False the work is done in this process, with the same result.

    Raises UserError where a corpus has no usable recording.
    """
    console = console or Console(stderr=True)
    return [
        _prepare_corpus(name, _corpus_directory(name, given, space.cache_dir(), console), space, use_ray, console)
        for name, given in space.experiment.corpora.items()
    ]


def write_chunk(chunk: pa.Table, corpus_directory: str, shard_directory: str, audio: config.Audio) -> pa.Table:
    """Decode the utterances of one chunk and write them as one shard, then beside it what was rejected and why.

    ``chunk`` has the columns of `CHUNK_SCHEMA` and one shard name throughout. Returns that name, as one row.
    """
    (name,) = set(chunk["shard"].to_pylist())
    directory = Path(corpus_directory)
    if not directory.is_dir():
        return pa.table({"shard": [name]})  # no note is written: `_rejected` tells the user
    rows, rejected = [], []
    for utterance in chunk.drop_columns(["shard"]).to_pylist():
        try:
            samples = to_int16(load_waveform(directory / utterance["path"], audio))
        except Unusable as reason:
            rejected.append({"path": utterance["path"], "reason": str(reason)})
            continue
        rows.append(
            utterance
            | {"duration": len(samples) / SAMPLING_RATE, "num_samples": len(samples), "audio": samples.tobytes()}
            | {"audio_sha256": hashlib.sha256(samples.tobytes()).hexdigest()}
        )
    path = Path(shard_directory) / name
    shards.write_shard(pa.Table.from_pylist(rows, schema=shards.SCHEMA), path)
    write_json(path.with_suffix(".json"), {"rejected": rejected})
    return pa.table({"shard": [name]})


# -- below: how it is done


def _corpus_directory(name: str, given: str | None, cache: Path, console: Console) -> Path:
    """Where a corpus lies; the synthetic one is made first where nobody gave a directory."""
    if given is not None:
        return Path(given).expanduser().resolve()
    if name != "synthetic":
        raise UserError(f"experiment.corpora.{name} has no directory; write {name}: path/to/{name}")
    directory = cache / "corpora" / f"synthetic-{synthetic.VERSION}"
    if (directory / synthetic.MANIFEST).is_file():
        return directory
    with _progress(console, "synthetic: speaking") as progress:
        task = progress.add_task("synthetic: speaking", total=None)
        synthetic.make(directory, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
    return directory


def _prepare_corpus(name: str, directory: Path, space: config.SearchSpace, use_ray: bool, console: Console) -> Path:
    utterances, rejected = corpora.read(name, directory)
    audio = space.experiment.audio
    target = space.cache_dir() / "shards" / f"{name}-{_fingerprint(directory, utterances, rejected, audio)}"
    if not shards.is_whole(target):
        target.mkdir(parents=True, exist_ok=True)
        chunks = _chunks(utterances)
        work = {"corpus_directory": str(directory), "shard_directory": str(target), "audio": audio}
        missing = [chunk for shard, chunk in chunks.items() if not (target / shard).with_suffix(".json").is_file()]
        _write_chunks(missing, work, use_ray, f"{name}: decoding", console)
        unusable = _rejected(target, chunks)
        if len(unusable) == len(utterances):
            such = f"{unusable[0].path}: {unusable[0].reason}"
            raise UserError(f"experiment.corpora.{name}: {directory} holds no usable recording, such as {such}")
        shards.write_manifest(target, name, list(chunks), [*rejected, *unusable], audio)
    console.print(_summary(shards.read_manifest(target), target), soft_wrap=True, highlight=False, markup=False)
    return target


def _fingerprint(
    directory: Path, utterances: Sequence[Utterance], rejected: Sequence[Rejected], audio: config.Audio
) -> str:
    """Of all that shards are made from: what the corpus says of each file, its size and its time of change."""
    rows = []
    for utterance in utterances:
        path = directory / utterance.path
        stat = path.stat() if path.exists() else None  # a dangling link is rejected later, with a reason
        rows.append([*asdict(utterance).values(), stat and [stat.st_size, stat.st_mtime_ns]])
    return config.fingerprint(shards.FORMAT, CHUNK, audio, rows, [asdict(r) for r in rejected])


def _chunks(utterances: Sequence[Utterance]) -> dict[str, pa.Table]:
    """Shard name -> its utterances."""
    chunks = {}
    for number, start in enumerate(range(0, len(utterances), CHUNK)):
        shard = f"shard-{number:05d}.parquet"
        rows = [{"shard": shard} | asdict(utterance) for utterance in utterances[start : start + CHUNK]]
        chunks[shard] = pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA)
    return chunks


def _write_chunks(
    chunks: Sequence[pa.Table], work: dict[str, Any], use_ray: bool, title: str, console: Console
) -> None:
    if not chunks:
        return
    written = _with_ray(chunks, work) if use_ray else (write_chunk(chunk, **work) for chunk in chunks)
    with _progress(console, title) as progress:
        for _ in progress.track(written, total=len(chunks), description=title):
            pass


def _with_ray(chunks: Sequence[pa.Table], work: dict[str, Any]) -> Iterator[object]:
    """One block a chunk and one task a block."""
    cluster.connect()
    dataset = ray.data.from_arrow(list(chunks)).map_batches(
        write_chunk, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=work
    )
    return iter(dataset.iter_rows())


def _rejected(target: Path, names: Iterable[str]) -> list[Rejected]:
    """What the chunks left out, from the notes beside their shards."""
    found: list[Rejected] = []
    for name in names:
        path = (target / name).with_suffix(".json")
        if not path.is_file():
            raise UserError(
                f"{path} is missing, though its task has run: on a cluster, storage.cache and the directories under "
                "experiment.corpora must be paths that every node sees"
            )
        found += [Rejected(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rejected"]]
    return found


def _summary(manifest: dict[str, Any], target: Path) -> str:
    reasons = [f"{entry['path']}: {entry['reason']}" for entry in manifest["rejected"]]
    shown = f" ({'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''})" if reasons else ""
    return (
        f"{manifest['corpus']}: {manifest['utterances']} utterances, {manifest['speakers']} speakers, "
        f"{manifest['hours']:.2f} h, {len(reasons)} rejected{shown}, in {target}"
    )


def _progress(console: Console, title: str) -> Progress:
    """A bar on a terminal; in a job's log, where a bar cannot move, the title as a line."""
    if not console.is_terminal:
        console.print(f"{title} ...", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
