"""Predict the emotions of audio files with a checkpoint; prints a table, JSON lines or CSV, with probabilities.

    python -m ser_ray.predict CHECKPOINT AUDIO... [--format table|jsonl|csv] [--output FILE] [--backbone DIR]

CHECKPOINT is a directory such as results/demo/best, AUDIO a file or a folder. Audio is decoded, resampled and trimmed
as the training data was. It runs without Ray, in one process, on the GPU if there is one.
"""

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["predict", *sys.argv[1:]]))

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ser_ray.disk import write_text
from ser_ray.models import checkpoint
from ser_ray.models.precision import choose_device
from ser_ray.schema import UserError
from ser_ray.training.inference import Answer, answer_columns, predict

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".opus")
"""Suffixes of the files that are read from a folder; a file that is named is read whatever its suffix."""


def find_audio(inputs: Sequence[Path]) -> list[Path]:
    """Named files as they are, and all files in folders, to any depth, that have one of `AUDIO_SUFFIXES`.

    Raises UserError for a path that does not exist, and for a folder without audio.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path}: no audio in this folder (looked for {', '.join(AUDIO_SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


def main(
    directory: Path, audio: list[Path], format: str = "table", output: Path | None = None, backbone: str | None = None
) -> int:
    """``ser-ray predict``: predictions of the checkpoint in ``directory``; returns 1 if a file could not be used.
    ``backbone``: where the checkpoint's backbone is now, if that has moved."""
    paths = find_audio(audio)
    model = checkpoint.load(directory, choose_device(), backbone)
    progress = Console(stderr=True)
    answers: list[Answer] = []
    with progress.status("") as status:
        for answer in predict(model, paths):
            answers.append(answer)
            status.update(f"{len(answers)} of {len(paths)} files")
    text = _FORMATS[format](answers, model.experiment.emotions)
    if output:
        write_text(output, text)
    else:
        sys.stdout.write(text)
    failed = [answer for answer in answers if answer.reason]
    for answer in failed:
        progress.print(f"{answer.path}: {answer.reason}", style="red", highlight=False)
    return 1 if failed else 0


# -- below: how it is done


def _table(answers: Sequence[Answer], emotions: Sequence[str]) -> str:
    table = Table("file", "emotion", *emotions, box=None, header_style="bold")
    for answer in answers:
        cells = [f"{answer.probabilities[e]:.2f}" if answer.probabilities else "" for e in emotions]
        table.add_row(answer.path, answer.emotion or "(not usable)", *cells)
    buffer = io.StringIO()
    Console(file=buffer, width=40 + 11 * len(emotions) + max((len(a.path) for a in answers), default=0)).print(table)
    return buffer.getvalue()


def _jsonl(answers: Sequence[Answer], emotions: Sequence[str]) -> str:
    lines = (
        {"path": a.path, "emotion": a.emotion or None, "probabilities": a.probabilities}
        | ({"reason": a.reason} if a.reason else {})
        for a in answers
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _csv(answers: Sequence[Answer], emotions: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, answer_columns(emotions))
    writer.writeheader()
    writer.writerows(answer.row(emotions) for answer in answers)
    return buffer.getvalue()


_FORMATS = {"table": _table, "jsonl": _jsonl, "csv": _csv}
