"""Corpora -> shards of checked speech, with Ray Data: ``ser-ray prepare SPACE.yaml [key=value ...]``.

Every corpus gets one directory of shards under ``storage.cache``, named by a fingerprint of everything it is made from:
files, labels, audio settings. A second run finds it and does nothing; a changed input makes another directory.

Recordings are decoded in chunks. A chunk writes its own shard, its fingerprints, which the audit compares, and then a
note of what it rejected and flagged, so that an interrupted run continues where it stopped, a retried task overwrites
its earlier output, and two runs at once write the same bytes. A shard's name is the fingerprint of its chunk: after a
change, the shards of unchanged chunks are linked from the older directory, and only the others are made. The manifest
is written last: only with it is the directory complete.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["prepare", *sys.argv[1:]]))

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray.data
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ser_ray import config, corpora
from ser_ray.corpora import inside, synthetic
from ser_ray.corpora.describe import differences, left_out, raters
from ser_ray.corpora.rows import example_of
from ser_ray.disk import read_json, replacing, resolved, write_json
from ser_ray.runtime import cluster, paths
from ser_ray.runtime.allocation import Worker
from ser_ray.schema import SAMPLING_RATE, Rejected, UserError, Utterance, is_known, shortened
from ser_ray.speech import shards
from ser_ray.speech.audio import Unusable, is_silent, load_recording, to_int16
from ser_ray.speech.fingerprint import path_of, write_fingerprints
from ser_ray.speech.formats import ADVICE, FFMPEG_SUFFIXES, has_pyav
from ser_ray.terminal import PlainConsole, one_line

CHUNK: Final = 64
"""Approximate utterances per task and shard: 6 MB at 3 s each; seconds of work, which is the cost of a retry."""
MOST_SHARDS: Final = 4096
"""Approximate maximum per corpus: beyond about 200 hours shards become larger instead of more, as every process opens
each of them once and shared file systems are slow at that."""
CHUNK_BYTES: Final = 2**28
"""A chunk of long recordings ends at this total size of its files, as it is held in memory, decoded."""

UTTERANCE: Final = tuple(field.name for field in fields(Utterance))
CHUNK_SCHEMA: Final = pa.schema(
    [
        ("shard", pa.string()),
        *((field.name, pa.float64() if "float" in str(field.type) else pa.string()) for field in fields(Utterance)),
    ]
)


def main(path: Path | None, overrides: list[str]) -> int:
    """``ser-ray prepare``: prepare every corpus of a search space."""
    console = PlainConsole(stderr=True)
    space = config.load(path or config.default_space(), overrides, needs_backbone=False)
    directories = prepare(paths.resolve_paths(space), console=console)
    console.print(summary(shards.read_index(directories)))
    return 0


def prepare(space: config.SearchSpace, use_ray: bool = True, console: Console | None = None) -> list[Path]:
    """Make sure that every corpus of the experiment exists as shards; returns their directories, one per corpus.

    With ``use_ray`` False the work is done in this process, with the same result.

    Raises UserError where a corpus has no usable recording.
    """
    console = console or PlainConsole(stderr=True)
    return [
        _prepare_corpus(name, _corpus_path(name, given, space.cache_dir(), console), space, use_ray, console)
        for name, given in space.experiment.corpora.items()
    ]


def summary(index: pa.Table) -> Table:
    """A human-readable table of utterances, speakers and hours by corpus and emotion."""
    table = Table("corpus", "emotion", box=box.SIMPLE_HEAD)
    for header in ("utterances", "speakers", "hours"):
        table.add_column(header, justify="right")
    named = [speaker if is_known(speaker) else None for speaker in index["speaker"].to_pylist()]
    index = index.set_column(index.column_names.index("speaker"), "speaker", pa.array(named, pa.string()))
    measures = [("utterance_id", "count"), ("speaker", "count_distinct"), ("duration", "sum")]
    for keys in (["corpus", "emotion"], ["corpus"]):
        counts = index.group_by(keys).aggregate(measures).sort_by([(key, "ascending") for key in keys])
        for row in counts.to_pylist():
            table.add_row(
                row["corpus"],
                row.get("emotion", "all"),
                str(row["utterance_id_count"]),
                str(row["speaker_count_distinct"]),
                f"{row['duration_sum'] / 3600:.2f}",
            )
        table.add_section()
    return table


def chunk_size(utterances: int) -> int:
    """Approximate utterances per shard, in powers of two, so that a corpus that grows keeps most of its shards.

    >>> chunk_size(1440), chunk_size(4_500_000)
    (64, 2048)
    """
    chunk = CHUNK
    while utterances > MOST_SHARDS * chunk:
        chunk *= 2
    return chunk


def write_chunk(chunk: pa.Table, corpus_directory: str, shard_directory: str, audio: config.Audio) -> pa.Table:
    """Decode the utterances of one chunk and write them as one shard and their fingerprints, then a note of what was
    rejected and flagged.

    ``chunk`` has the columns of `CHUNK_SCHEMA` and one shard name throughout. Returns that name, as one row.
    """
    (name,) = set(chunk["shard"].to_pylist())
    directory = Path(corpus_directory)
    if not directory.is_dir():
        return pa.table({"shard": [name]})  # no note is written: `_notes` raises for that
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    flagged: list[dict[str, str]] = []
    for utterance in chunk.drop_columns(["shard"]).to_pylist():
        place = _place(utterance)
        try:
            recording = load_recording(directory / utterance["path"], audio, utterance["start"], utterance["end"])
        except Unusable as reason:
            rejected.append({"path": place, "reason": str(reason)})
            continue
        flagged += [{"path": place, "reason": flag} for flag in recording.flags]
        for number, window in enumerate(recording.windows, start=1):
            suffix = f"#{number}" if len(recording.windows) > 1 else ""
            if is_silent(window):
                rejected.append({"path": place + suffix, "reason": "silent: the window's peak is below -60 dBFS"})
            else:
                rows.append(_row(utterance | {"utterance_id": utterance["utterance_id"] + suffix}, to_int16(window)))
    path = Path(shard_directory) / name
    shards.write_shard(pa.Table.from_pylist(rows, schema=shards.SCHEMA), path)
    write_fingerprints(path)
    file = {"bytes": path.stat().st_size, "sha256": shards.digest(path)}
    note = {"utterances": len(rows), "rejected": rejected, "flagged": flagged, "file": file}
    write_json(path.with_suffix(".json"), note)
    return pa.table({"shard": [name]})


def fingerprint_shard(chunk: pa.Table, shard_directory: str) -> pa.Table:
    """Write the fingerprints of the one shard that ``chunk`` names; returns that name, as one row."""
    write_fingerprints(Path(shard_directory) / chunk["shard"][0].as_py())
    return chunk


# -- below: how it is done


def _place(utterance: Mapping[str, Any]) -> str:
    """The path of a recording and, for a part of one, where the part starts and ends in seconds."""
    start, end = utterance["start"], utterance["end"]
    part = "" if start is None and end is None else f"#{start or 0:g}-{'' if end is None else f'{end:g}'}"
    return f"{utterance['path']}{part}"


def _row(utterance: dict[str, Any], samples: np.ndarray) -> dict[str, Any]:
    content = samples.tobytes()
    length = {"duration": len(samples) / SAMPLING_RATE, "num_samples": len(samples)}
    return utterance | length | {"audio": content, "audio_sha256": hashlib.sha256(content).hexdigest()}


def _corpus_path(name: str, given: str | None, cache: Path, console: Console) -> str | Path:
    """The directory or table of a corpus. The synthetic one is made first if no directory is given; one whose
    recordings are inside of its tables is unpacked first."""
    if given is not None:
        prefix, path = corpora.parted(given)
        path = resolved(path)
        if prefix == "hf" or inside.holds_recordings(path):
            return _unpacked(name, path, cache, console)
        return f"{prefix}:{path}" if prefix else path
    if name != "synthetic":
        raise UserError(f"experiment.corpora.{name} has no directory; write {name}: path/to/{name}")
    directory = cache / "corpora" / f"synthetic-{synthetic.VERSION}"
    if (directory / synthetic.MANIFEST).is_file():
        return directory
    with _progress(console, "synthetic: generating speech") as progress:
        task = progress.add_task("synthetic: generating speech", total=None)
        synthetic.make(directory, on_progress=lambda done, total: progress.update(task, completed=done, total=total))
    return directory


def _unpacked(name: str, path: Path, cache: Path, console: Console) -> Path:
    """The table of a corpus whose recordings are inside of it, unpacked below the cache, once for every state."""
    files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in inside.files_of(path)]
    directory = cache / "corpora" / f"{name}-{config.fingerprint(inside.VERSION, files)}"
    title = f"{name}: unpacking recordings"
    if (directory / inside.TABLE).is_file():
        return directory / inside.TABLE
    with _progress(console, title) as progress:
        task = progress.add_task(title, total=None)
        return inside.unpack(path, directory, lambda done: progress.update(task, completed=done))


def _prepare_corpus(name: str, path: str | Path, space: config.SearchSpace, use_ray: bool, console: Console) -> Path:
    labels = space.experiment.labels.get(name, {})
    utterances, rejected = corpora.read(name, path, labels)
    for line in (raters(name, utterances, rejected), left_out(name, utterances, space.experiment)):
        if line:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    directory = corpora.folder_of(path)
    audio = space.experiment.audio
    chunks = _chunks(utterances, directory, audio)
    fingerprint = config.fingerprint(shards.FORMAT, list(chunks), [asdict(r) for r in rejected], labels)
    target = space.cache_dir() / "shards" / f"{name}-{fingerprint}"
    if bad := shards.damaged(target) if shards.is_whole(target) else []:
        console.print(f"{name}: {len(bad)} of {len(chunks)} shards are damaged, such as {target / bad[0]}; made again")
        (target / shards.MANIFEST).unlink()
    if not shards.is_whole(target):
        target.mkdir(parents=True, exist_ok=True)
        work = {"corpus_directory": str(directory), "shard_directory": str(target), "audio": audio}
        missing = [chunk for shard, chunk in chunks.items() if shard in bad or not _found(target, shard)]
        _in_tasks(write_chunk, missing, work, use_ray, f"{name}: decoding", console)
        notes = _notes(target, chunks)
        unusable, flagged = (
            [Rejected(**entry) for note in notes for entry in note[k]] for k in ("rejected", "flagged")
        )
        if not any(note["utterances"] for note in notes):
            raise UserError(f"experiment.corpora.{name}: {path} holds no usable recording{example_of(unusable)}")
        files = {shard: note["file"] for shard, note in zip(chunks, notes, strict=True) if "file" in note}
        shards.write_manifest(target, name, list(chunks), [*rejected, *unusable], audio, flagged, files)
    _add_fingerprints(target, use_ray, f"{name}: fingerprints", console)
    console.print(_line(shards.read_manifest(target), target), soft_wrap=True, highlight=False, markup=False)
    return target


def _chunks(utterances: Sequence[Utterance], directory: Path, audio: config.Audio) -> dict[str, pa.Table]:
    """Shard name -> its utterances. The name is a fingerprint of all that the shard is made from: the corpus's metadata
    of each file, its size and modification time, and the audio settings."""
    chunks = {}
    for run in _runs(utterances, directory, chunk_size(len(utterances))):
        metadata = [{name: getattr(utterance, name) for name in UTTERANCE} for utterance, _ in run]
        stats = [stat and [stat.st_size, stat.st_mtime_ns, *_reader(utterance.path)] for utterance, stat in run]
        rows = [[*utterance.values(), stat] for utterance, stat in zip(metadata, stats, strict=True)]
        shard = f"{config.fingerprint(shards.FORMAT, audio, rows)}.parquet"
        chunks[shard] = pa.Table.from_pylist([{"shard": shard} | u for u in metadata], schema=CHUNK_SCHEMA)
    return chunks


def _reader(path: str) -> list[bool]:
    """What else decides whether a recording can be read: that PyAV is there, if its format needs it."""
    return [has_pyav()] if path.lower().endswith(FFMPEG_SUFFIXES) else []


def _runs(
    utterances: Iterable[Utterance], directory: Path, chunk: int
) -> Iterator[list[tuple[Utterance, os.stat_result | None]]]:
    """Runs of half to one and a half times ``chunk`` utterances, ordered by a hash of their ids, so that every shard,
    and every window of the stream, holds a mix of speakers and emotions. Where a run ends depends on nearby ids, not on
    how many come before: adding or removing an utterance changes one run or two, not all that follow."""
    run: list[tuple[Utterance, os.stat_result | None]] = []
    size = 0
    for utterance in sorted(utterances, key=_digest):
        path = directory / utterance.path
        stat = path.stat() if path.exists() else None  # a dangling link is rejected later, with a reason
        run.append((utterance, stat))
        size += stat.st_size if stat and utterance.end is None else 0
        ends = int.from_bytes(_digest(utterance)[-4:]) % (chunk // 2) == 0
        if (ends and len(run) >= chunk // 2) or len(run) == chunk + chunk // 2 or size > CHUNK_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _digest(utterance: Utterance) -> bytes:
    return hashlib.sha256(utterance.utterance_id.encode()).digest()


def _add_fingerprints(target: Path, use_ray: bool, title: str, console: Console) -> None:
    """Those that are missing, as in a directory that an older version prepared. Without them in a directory that is not
    ours to write to, the audit makes them itself."""
    there = {path.name for path in target.iterdir()}
    missing = [path.name for path in shards.shard_paths(target) if path_of(path).name not in there]
    if missing and os.access(target, os.W_OK):
        chunks = [pa.table({"shard": [name]}) for name in missing]
        _in_tasks(fingerprint_shard, chunks, {"shard_directory": str(target)}, use_ray, title, console)


def _found(target: Path, shard: str) -> bool:
    """Whether a shard and its note exist; if only an older directory has them, they are linked from there."""
    note = Path(shard).with_suffix(".json").name
    if (target / note).is_file():
        return True
    corpus = target.name.rpartition("-")[0]
    for older in sorted(target.parent.glob(f"{corpus}-*/{note}")):
        if (older.parent / shard).is_file():
            names = (shard, path_of(Path(shard)).name, note)  # the note last, as it marks the shard as complete
            for name in names:
                if not (older.parent / name).is_file():  # an older version made no fingerprints
                    continue
                with replacing(target / name) as aside:
                    try:
                        aside.hardlink_to(older.parent / name)
                    except OSError:  # a file system without links
                        shutil.copyfile(older.parent / name, aside)
            return True
    return False


def _in_tasks(
    task: Callable[..., pa.Table],
    chunks: Sequence[pa.Table],
    work: dict[str, Any],
    use_ray: bool,
    title: str,
    console: Console,
) -> None:
    """Run ``task`` on each chunk, as tasks of Ray on all nodes or here, with a progress bar."""
    if not chunks:
        return
    done = _with_ray(task, chunks, work, console) if use_ray else (task(chunk, **work) for chunk in chunks)
    with _progress(console, title) as progress:
        for _ in progress.track(done, total=len(chunks), description=title):
            pass


def _with_ray(
    task: Callable[..., pa.Table], chunks: Sequence[pa.Table], work: dict[str, Any], console: Console
) -> Iterator[object]:
    """One block per chunk and one task per block."""
    cluster.connect()
    cluster.wait_for_room(Worker(cpus=1, gpus=0), 1, "a CPU", console)
    dataset = ray.data.from_arrow(list(chunks)).map_batches(
        task, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=work
    )
    yield from dataset.iter_rows()


def _notes(target: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The notes that the chunks wrote with their shards."""
    notes = []
    for name in names:
        path = (target / name).with_suffix(".json")
        if not path.is_file():
            raise UserError(
                f"{path} is missing, though its task has run: on a cluster, storage.cache and the directories under "
                "experiment.corpora must be paths that every node sees"
            )
        notes.append(read_json(path))
    return notes


def _line(manifest: Mapping[str, Any], target: Path) -> str:
    differs = differences(manifest["corpus"], manifest)
    lacking = sum(ADVICE in entry["reason"] for entry in manifest["rejected"])
    ties = manifest.get("ties", 0)  # older manifests lack it; a corpus without listeners has none
    unknown = manifest.get("unknown_speakers", 0)
    speakers = f"{manifest['speakers']} speakers" + (f" (not known for {unknown} utterances)" if unknown else "")
    return (
        f"{manifest['corpus']}: {manifest['utterances']} utterances, {speakers}, "
        f"{manifest['hours']:.2f} h, {_some('rejected', manifest)}, {_some('flagged', manifest)}, in {target}"
        + (f"\n{manifest['corpus']}: listeners tied on {ties} utterances; label: perceived omits them" if ties else "")
        + (f"\n{manifest['corpus']}: {lacking} recordings need PyAV to be read: {ADVICE}" if lacking else "")
        + (f"\n{manifest['corpus']} differs from the published corpus: {', '.join(differs)}" if differs else "")
    )


def _some(what: str, manifest: Mapping[str, Any]) -> str:
    """How many recordings were rejected or flagged, and the first few with their reasons."""
    reasons = [one_line(f"{shortened(entry['path'], 160)}: {entry['reason']}") for entry in manifest[what]]
    shown = f" ({'; '.join(reasons[:3])}{'; ...' if len(reasons) > 3 else ''})" if reasons else ""
    return f"{len(reasons)} {what}{shown}"


def _progress(console: Console, title: str) -> Progress:
    """A progress bar in a terminal; in a job's log, where a bar cannot move, the title as a line."""
    if not console.is_terminal:
        console.print(f"{title} ...", highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
