"""Predict the emotions of audio files with a checkpoint; prints a table, JSON lines or CSV, with probabilities.

    python -m ser_ray.predict CHECKPOINT AUDIO... [--format table|jsonl|csv] [--output FILE] [--backbone DIR] [--sets]
    python -m ser_ray.predict CHECKPOINT AUDIO... --voice voice.json     # of `ser_ray.enrol`
    python -m ser_ray.predict CHECKPOINT TABLE --enrol self              # a table with the columns path and speaker

CHECKPOINT is a directory such as results/demo/best, or an export of it in ONNX: its folder, or the file. AUDIO is a
file, a folder, or - for standard input. Audio is decoded, resampled and trimmed as the training data was; a long
recording is answered window by window, and as a whole. It runs without Ray, in one process, on the GPU if there is one;
an export runs on the CPU.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["predict", *sys.argv[1:]]))

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from rich.table import Table

from ser_ray.corpora import table
from ser_ray.corpora.files import find_audio
from ser_ray.disk import readable
from ser_ray.exporting import onnx_of
from ser_ray.models import ensemble, voice_file
from ser_ray.models.ensemble import Model
from ser_ray.models.precision import choose_device
from ser_ray.schema import UserError
from ser_ray.speech.formats import ADVICE
from ser_ray.terminal import PlainConsole, one_line, opened_output, output_path
from ser_ray.training.enrolment import doubt, listening, predict_each_other
from ser_ray.training.inference import Answer, answer_columns, predict, threshold_of

SEPARATOR: Final = "|"
"""Between the emotions of a set, in a cell of CSV."""


def main(
    directory: Path,
    audio: list[Path],
    format: str = "table",
    output: Path | None = None,
    backbone: str | None = None,
    voice: Path | None = None,
    enrol: bool = False,
    sets: bool = False,
) -> int:
    """``ser-ray predict``: predictions of the checkpoint in ``directory``; returns 1 if a file could not be used.

    ``backbone``: where the checkpoint's backbone is now, if that has moved. ``voice``: what is known of the one speaker
    of all recordings. ``enrol``: ``audio`` is a table, and the recordings of a speaker in it make the speaker known.
    ``sets``: with each answer a set that holds the true emotion in 90 % of the cases.
    """
    target = output and output_path(output)
    if voice and enrol:
        raise UserError("--voice and --enrol: give one of them")
    named = _of_table(audio) if enrol else []
    paths = [path for path, _ in named] or find_audio(audio)
    if target and any(_is_same(path, target) for path in paths):
        raise UserError(f"--output: {readable(output or '')} is one of the recordings")
    progress = PlainConsole(stderr=True)
    distances: list[float] = []
    least: float | None = None
    if exported := onnx_of(directory):
        if enrol or backbone:
            raise UserError(f"{exported}: --enrol and --backbone need the checkpoint, not its export")
        emotions, least, predicted = _of_onnx(exported, paths, voice, sets, progress)
    else:
        model = ensemble.load(directory, choose_device(), backbone)
        emotions = model.experiment.emotions
        least = threshold_of(model, directory) if sets else None
        predicted = _predicted(model, directory, paths, voice, [speaker for _, speaker in named], progress)
        distances = listening(model) if voice else []
    failed: list[Answer] = []
    with progress.status("") as status, opened_output(target) as file:

        def answers() -> Iterator[Answer]:
            done = 0
            for answer in predicted:
                yield answer
                done += answer.start is None
                failed.extend([answer] if answer.reason and answer.start is None else [])
                status.update(f"{done} of {len(paths)} files")

        _FORMATS[format](answers(), emotions, file, least)
    for line in _problems(failed):
        progress.print(line, style="red")
    if doubted := doubt(distances):
        progress.print(doubted, style="yellow")
    return 1 if failed else 0


# -- below: how it is done


def _of_table(audio: Sequence[Path]) -> list[tuple[Path, str]]:
    """The recordings of the one table, each with its speaker."""
    if len(audio) != 1 or not table.is_table(audio[0]):
        raise UserError("--enrol self: give one table (.csv, .tsv, .parquet) with the columns path and speaker")
    return table.recordings_of(audio[0])


def _predicted(
    model: Model,
    directory: Path,
    paths: Sequence[Path],
    voice: Path | None,
    speakers: Sequence[str],
    progress: PlainConsole,
) -> Iterator[Answer]:
    """The answers, with what is to be known of the speakers; says so, as every such answer depends on it."""
    if not voice and not speakers:
        return predict(model, paths)
    voice_file.check_uses_voices(model, directory)
    if voice:
        known = voice_file.read(voice, model)
        progress.print(f"{known}: {one_line(str(voice))}")
        return predict(model, paths, known.voice)
    progress.print(f"used all other unlabelled recordings of the speaker: {len(set(speakers))} speakers")
    return predict_each_other(model, paths, speakers)


def _of_onnx(
    path: Path, paths: Sequence[Path], voice: Path | None, sets: bool, progress: PlainConsole
) -> tuple[Sequence[str], float | None, Iterator[Answer]]:
    """The emotions, the threshold of sets where they are asked for, and the answers of an export."""
    from ser_ray.exporting.session import OnnxClassifier  # what it needs is imported for an export alone

    exported = OnnxClassifier(path)
    least = threshold_of(exported, path) if sets else None
    if voice is None:
        return exported.emotions, least, exported.predict(paths)
    if not exported.uses_voices:
        raise UserError(f"{path}: this export does not use what is known of a speaker; leave out --voice")
    known = voice_file.read_for(voice, exported.head, exported.widths)
    progress.print(f"{known}: {one_line(str(voice))}")
    return exported.emotions, least, exported.predict(paths, known.voice)


def _is_same(path: Path, other: Path) -> bool:
    return os.path.exists(path) and os.path.exists(other) and other.samefile(path)  # noqa: PTH110


def _problems(failed: Sequence[Answer]) -> Iterator[str]:
    """A line for each recording that could not be used, and one for all that lack PyAV."""
    lacking = [answer for answer in failed if ADVICE in answer.reason]
    for answer in failed:
        if answer not in lacking:
            yield f"{one_line(answer.path)}: {answer.reason}"
    if lacking:
        yield f"{len(lacking)} recordings, such as {one_line(lacking[0].path)}, need PyAV: {ADVICE}"


def _table(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO, least: float | None = None) -> None:
    all_answers = list(answers)
    with_times = any(answer.start is not None for answer in all_answers)
    first = ["file", *(["from", "to"] if with_times else []), "emotion", *(["set"] if least is not None else [])]
    grid = Table(*first, *emotions, box=None, header_style="bold")
    for answer in all_answers:
        cells = [f"{answer.probabilities[e]:.2f}" if answer.probabilities else "" for e in emotions]
        times = ["" if at is None else f"{at:.1f} s" for at in (answer.start, answer.end)] if with_times else []
        sets = [] if least is None else [" or ".join(answer.emotions_from(least))]
        grid.add_row(one_line(answer.path), *times, answer.emotion or "(not usable)", *sets, *cells)
    width = 60 + 26 * len(emotions) + max((len(one_line(a.path)) for a in all_answers), default=0)
    PlainConsole(file=file, width=width, soft_wrap=False).print(grid)


def _jsonl(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO, least: float | None = None) -> None:
    for answer in answers:
        line: dict[str, Any] = {"path": answer.path, "emotion": answer.emotion or None}
        if least is not None:
            line["set"] = answer.emotions_from(least)
        if answer.start is not None:
            line |= {"start": answer.start, "end": answer.end}
        line["probabilities"] = answer.probabilities
        if answer.reason:
            line["reason"] = answer.reason
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()


def _csv(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO, least: float | None = None) -> None:
    writer = csv.DictWriter(file, answer_columns(emotions, least is not None))
    writer.writeheader()
    for answer in answers:
        row = answer.row(emotions, least)
        writer.writerow(row | {"set": SEPARATOR.join(row["set"] or ())} if least is not None else row)
        file.flush()


_FORMATS: dict[str, Callable[[Iterable[Answer], Sequence[str], TextIO, float | None], None]] = {
    "table": _table,
    "jsonl": _jsonl,
    "csv": _csv,
}
