"""Make a speaker known to a checkpoint by recordings without labels; `predict --voice` uses what this writes.

    python -m ser_ray.enrol CHECKPOINT AUDIO... --output voice.json [--name NAME] [--backbone DIR]

All recordings have to be of one speaker. The file has numbers and no audio. It runs without Ray, in one process.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys

    from ser_ray.__main__ import main as command

    sys.exit(command(["enrol", *sys.argv[1:]]))

from pathlib import Path

from ser_ray.corpora.files import find_audio
from ser_ray.models import ensemble, voice_file
from ser_ray.models.precision import choose_device
from ser_ray.schema import UserError
from ser_ray.terminal import PlainConsole, one_line, output_path
from ser_ray.training.enrolment import FAR, enrol


def main(directory: Path, audio: list[Path], output: Path, name: str = "", backbone: str | None = None) -> int:
    """``ser-ray enrol``: write the voice of a speaker; returns 1 if a recording could not be used."""
    target, paths = output_path(output), find_audio(audio)
    model = ensemble.load(directory, choose_device(), backbone)
    voice_file.check_uses_voices(model, directory)
    console = PlainConsole(stderr=True)
    with console.status(f"{len(paths)} recordings"):
        voice, unusable, far = enrol(model, paths)
    for piece in unusable:
        console.print(f"{one_line(piece.path)}: {piece.reason or 'its pooled vector is not finite'}", style="red")
    for piece, distance in far:
        doubted = (
            f"distance to the others {distance:.1f}, above {FAR:g}: another person, or another microphone or room?"
        )
        console.print(f"{one_line(piece.path)}: {doubted}", style="yellow")
    made = voice_file.saved(model, voice, name)
    if not made.recordings:
        raise UserError("no recording could be used")
    voice_file.write(made, target)
    console.print(f"{made.recordings} recording{'s' * (made.recordings != 1)} enrolled: {output}", soft_wrap=True)
    return 1 if unusable else 0
