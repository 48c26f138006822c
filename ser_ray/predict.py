"""Predict the emotions of audio files with a checkpoint; prints a table, JSON lines or CSV, with probabilities.

    python -m ser_ray.predict CHECKPOINT AUDIO... [--format table|jsonl|csv] [--output FILE] [--backbone DIR]

CHECKPOINT is a directory such as results/demo/best, AUDIO a file, a folder, or - for standard input. Audio is decoded,
resampled and trimmed as the training data was; a long recording is answered window by window, and as a whole. It runs
without Ray, in one process, on the GPU if there is one.
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
from typing import Any, TextIO

from rich.table import Table

from ser_ray.corpora.files import audio_files
from ser_ray.disk import readable
from ser_ray.models import checkpoint
from ser_ray.models.precision import choose_device
from ser_ray.schema import UserError
from ser_ray.speech.formats import ADVICE, SUFFIXES
from ser_ray.speech.long import STDIN
from ser_ray.terminal import PlainConsole, one_line, opened_output, output_path
from ser_ray.training.inference import Answer, answer_columns, predict


def find_audio(inputs: Sequence[Path]) -> list[Path]:
    """Named files as they are, and in place of a folder all recordings in it, to any depth.

    A path that does not exist and a folder without recordings stay, for an answer that says so. Raises UserError if
    there is nothing else.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in inputs:
        is_folder = os.path.isdir(path)  # noqa: PTH112  (false, not an error, for an impossible name)
        # Nobody writes into a pipe that lies in a folder: reading it would not end.
        inside = [file for name in audio_files(path) if not (file := path / name).is_fifo()] if is_folder else []
        files += inside or [path]
        if is_folder and not inside:
            problems.append(f"{readable(path)}: no audio in this folder (looked for {', '.join(SUFFIXES)})")
        elif not is_folder and path != STDIN and not os.path.exists(path):  # noqa: PTH110
            problems.append(f"{readable(path)}: no such file or folder")
    if problems and len(problems) == len(inputs):
        raise UserError("; ".join(problems))
    return files


def main(
    directory: Path, audio: list[Path], format: str = "table", output: Path | None = None, backbone: str | None = None
) -> int:
    """``ser-ray predict``: predictions of the checkpoint in ``directory``; returns 1 if a file could not be used.
    ``backbone``: where the checkpoint's backbone is now, if that has moved."""
    target = output and output_path(output)
    paths = find_audio(audio)
    if target and any(_is_same(path, target) for path in paths):
        raise UserError(f"--output: {readable(output or '')} is one of the recordings")
    model = checkpoint.load(directory, choose_device(), backbone)
    progress = PlainConsole(stderr=True)
    failed: list[Answer] = []
    with progress.status("") as status, opened_output(target) as file:

        def answers() -> Iterator[Answer]:
            done = 0
            for answer in predict(model, paths):
                yield answer
                done += answer.start is None
                failed.extend([answer] if answer.reason and answer.start is None else [])
                status.update(f"{done} of {len(paths)} files")

        _FORMATS[format](answers(), model.experiment.emotions, file)
    for line in _problems(failed):
        progress.print(line, style="red")
    return 1 if failed else 0


# -- below: how it is done


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


def _table(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO) -> None:
    all_answers = list(answers)
    with_times = any(answer.start is not None for answer in all_answers)
    table = Table("file", *(["from", "to"] if with_times else []), "emotion", *emotions, box=None, header_style="bold")
    for answer in all_answers:
        cells = [f"{answer.probabilities[e]:.2f}" if answer.probabilities else "" for e in emotions]
        times = ["" if at is None else f"{at:.1f} s" for at in (answer.start, answer.end)] if with_times else []
        table.add_row(one_line(answer.path), *times, answer.emotion or "(not usable)", *cells)
    width = 60 + 11 * len(emotions) + max((len(one_line(a.path)) for a in all_answers), default=0)
    PlainConsole(file=file, width=width, soft_wrap=False).print(table)


def _jsonl(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO) -> None:
    for answer in answers:
        line: dict[str, Any] = {"path": answer.path, "emotion": answer.emotion or None}
        if answer.start is not None:
            line |= {"start": answer.start, "end": answer.end}
        line["probabilities"] = answer.probabilities
        if answer.reason:
            line["reason"] = answer.reason
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()


def _csv(answers: Iterable[Answer], emotions: Sequence[str], file: TextIO) -> None:
    writer = csv.DictWriter(file, answer_columns(emotions))
    writer.writeheader()
    for answer in answers:
        writer.writerow(answer.row(emotions))
        file.flush()


_FORMATS: dict[str, Callable[[Iterable[Answer], Sequence[str], TextIO], None]] = {
    "table": _table,
    "jsonl": _jsonl,
    "csv": _csv,
}
