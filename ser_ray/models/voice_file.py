"""A voice as a file: JSON with numbers, a name and a date, and no audio; for one checkpoint alone.

Its numbers are of the pooled vectors of one model, and mean nothing to another: the file has a digest of the head that
they were made for. That of the head is enough, since it holds the average speaker, which changes with every weight.
That of an ensemble has the numbers for each of its members.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ser_ray.disk import write_json
from ser_ray.models.ensemble import Model, members_of, uses_voices, widths_of
from ser_ray.models.voice import Voice
from ser_ray.models.weights import read_object
from ser_ray.schema import UserError

FORMAT: Final = 1
MOST: Final = 1e9
"""A limit for every number of a file; no pooled vector comes near it."""


@dataclass(frozen=True)
class SavedVoice:
    """A speaker as one checkpoint knows him or her; `write` and `read` keep it as a file."""

    name: str
    date: str
    """When it was made, such as 2026-11-29."""
    checkpoint: str
    """`digest` of the model."""
    voice: Voice | tuple[Voice, ...]
    """Of an ensemble one for each member."""

    @property
    def recordings(self) -> int:
        """How many recordings it is made of."""
        return int(self.voices[0].count_B[0])

    @property
    def voices(self) -> tuple[Voice, ...]:
        """One for each member of the model, which may be one."""
        return (self.voice,) if isinstance(self.voice, Voice) else self.voice

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        plural = "s" * (self.recordings != 1)
        return f"used {self.recordings} unlabelled recording{plural} of the speaker{name} (enrolled {self.date})"


def saved(model: Model, voice: Voice | tuple[Voice, ...], name: str) -> SavedVoice:
    """A voice of this model, made today."""
    return SavedVoice(name, time.strftime("%Y-%m-%d"), digest(model), voice)


def check_uses_voices(model: Model, source: object) -> None:
    """Raises UserError for a model whose heads make nothing of a voice; ``source`` names it."""
    if not uses_voices(model):
        raise UserError(
            f"{source}: this model does not use what is known of a speaker (head.speaker: none); train one with "
            "head.speaker: center"
        )


def check_is_of(saved: SavedVoice, model: Model, source: object) -> None:
    """Raises UserError for a voice of another model."""
    if saved.checkpoint != digest(model):
        raise _of_another(source)


def write(saved: SavedVoice, path: Path) -> None:
    """Write a voice to a file that `read` reads."""
    write_json(path, content_of(saved))


def content_of(saved: SavedVoice) -> dict[str, Any]:
    """A voice as the content of a file, for `parse`."""
    each = [{"mean": v.mean_BP[0].tolist(), "variance": v.variance_BP[0].tolist()} for v in saved.voices]
    numbers = each[0] if len(each) == 1 else {"members": each}
    about = {"name": saved.name, "recordings": saved.recordings, "date": saved.date, "checkpoint": saved.checkpoint}
    return {"format": FORMAT} | about | numbers


def read(path: Path, model: Model) -> SavedVoice:
    """A voice of this model. Raises UserError, in one line, for a file that is none, or is that of another model."""
    return parse(_content(path), model, path)


def read_for(path: Path, checkpoint: str, widths: Sequence[int]) -> SavedVoice:
    """The same for a model with this `digest`, and these `widths_of` it."""
    return _parse(_content(path), checkpoint, widths, path)


def parse(content: Mapping[str, Any], model: Model, source: object) -> SavedVoice:
    """A voice of this model from the content of a file, which ``source`` names. Raises UserError as `read`."""
    return _parse(content, digest(model), widths_of(model), source)


def digest(model: Model) -> str:
    """Twelve hex digits that identify a trained model, by its head, or an ensemble by those of its members."""
    hasher = hashlib.sha256()
    for member in members_of(model):
        for name, tensor in sorted(member.head.state_dict().items()):
            hasher.update(json.dumps([name, list(tensor.shape)]).encode())
            hasher.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:12]


# -- below: how it is done


def _parse(content: Mapping[str, Any], checkpoint: str, widths: Sequence[int], source: object) -> SavedVoice:
    """``widths``: of the pooled vectors of every member of the model."""
    if content.get("format") != FORMAT:
        raise UserError(f"{source}: not a voice of this version; make one with ser-ray enrol")
    if content.get("checkpoint") != checkpoint:
        raise _of_another(source)
    each = [content] if len(widths) == 1 else content.get("members")
    if not isinstance(each, list) or len(each) != len(widths) or not all(isinstance(one, dict) for one in each):
        raise UserError(f"{source}: damaged: it needs a voice for each of {len(widths)} members")
    voices = tuple(_voice(one, content, width, source) for one, width in zip(each, widths, strict=True))
    name, date = str(content.get("name", ""))[:200], str(content.get("date", ""))[:20]
    return SavedVoice(name, date, checkpoint, voices[0] if len(voices) == 1 else voices)


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; ser-ray enrol makes one")
    return read_object(path)


def _of_another(source: object) -> UserError:
    return UserError(f"{source}: a voice of another checkpoint; enrol the speaker with this one")


def _voice(numbers: Mapping[str, Any], content: Mapping[str, Any], width: int, source: object) -> Voice:
    """That of one model. ``numbers``: its mean and variance, ``content``: the whole file."""
    count = content.get("recordings")
    mean, variance = (_numbers(numbers.get(name), width) for name in ("mean", "variance"))
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < MOST or not mean or not variance:
        raise UserError(f"{source}: damaged: it needs recordings, and a mean and a variance of {width} finite numbers")
    if min(variance) < 0:
        raise UserError(f"{source}: damaged: a variance is below 0")
    return Voice(torch.tensor([float(count)]).double(), *(torch.tensor([v]).double() for v in (mean, variance)))


def _numbers(values: Any, count: int) -> list[float]:
    """The finite numbers of a list of that length; empty if it is none."""
    if not isinstance(values, list) or len(values) != count:
        return []
    numbers = [float(v) for v in values if isinstance(v, int | float) and abs(v) < MOST]
    return numbers if len(numbers) == count else []
