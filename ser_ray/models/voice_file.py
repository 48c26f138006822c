"""A voice as a file: JSON with numbers, a name and a date, and no audio; for one checkpoint alone.

Its numbers are of the pooled vectors of one model, and mean nothing to another: the file has a digest of the head that
they were made for. That of the head is enough, since it holds the average speaker, which changes with every weight.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ser_ray.disk import write_json
from ser_ray.models.classifier import EmotionClassifier
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
    voice: Voice

    @property
    def recordings(self) -> int:
        """How many recordings it is made of."""
        return int(self.voice.count_B[0])

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        plural = "s" * (self.recordings != 1)
        return f"used {self.recordings} unlabelled recording{plural} of the speaker{name} (enrolled {self.date})"


def saved(model: EmotionClassifier, voice: Voice, name: str) -> SavedVoice:
    """A voice of this model, made today."""
    return SavedVoice(name, time.strftime("%Y-%m-%d"), digest(model), voice)


def check_uses_voices(model: EmotionClassifier, source: object) -> None:
    """Raises UserError for a model whose head makes nothing of a voice; ``source`` names it."""
    if model.head.speaker is None:
        raise UserError(
            f"{source}: this model does not use what is known of a speaker (head.speaker: none); train one with "
            "head.speaker: center"
        )


def check_is_of(saved: SavedVoice, model: EmotionClassifier, source: object) -> None:
    """Raises UserError for a voice of another model."""
    if saved.checkpoint != digest(model):
        raise _of_another(source)


def write(saved: SavedVoice, path: Path) -> None:
    """Write a voice to a file that `read` reads."""
    write_json(path, content_of(saved))


def content_of(saved: SavedVoice) -> dict[str, Any]:
    """A voice as the content of a file, for `parse`."""
    numbers = {"mean": saved.voice.mean_BP[0].tolist(), "variance": saved.voice.variance_BP[0].tolist()}
    about = {"name": saved.name, "recordings": saved.recordings, "date": saved.date, "checkpoint": saved.checkpoint}
    return {"format": FORMAT} | about | numbers


def read(path: Path, model: EmotionClassifier) -> SavedVoice:
    """A voice of this model. Raises UserError, in one line, for a file that is none, or is that of another model."""
    return read_for(path, digest(model), model.head.embedding_width)


def read_for(path: Path, checkpoint: str, width: int) -> SavedVoice:
    """The same for a model with this `digest`, whose pooled vectors have this width."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; ser-ray enrol makes one")
    return _parse(read_object(path), checkpoint, width, path)


def parse(content: Mapping[str, Any], model: EmotionClassifier, source: object) -> SavedVoice:
    """A voice of this model from the content of a file, which ``source`` names. Raises UserError as `read`."""
    return _parse(content, digest(model), model.head.embedding_width, source)


def digest(model: EmotionClassifier) -> str:
    """Twelve hex digits that identify a trained model, by its head."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.head.state_dict().items()):
        hasher.update(json.dumps([name, list(tensor.shape)]).encode())
        hasher.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()[:12]


# -- below: how it is done


def _parse(content: Mapping[str, Any], checkpoint: str, width: int, source: object) -> SavedVoice:
    if content.get("format") != FORMAT:
        raise UserError(f"{source}: not a voice of this version; make one with ser-ray enrol")
    if content.get("checkpoint") != checkpoint:
        raise _of_another(source)
    count = content.get("recordings")
    mean, variance = (_numbers(content.get(name), width) for name in ("mean", "variance"))
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < MOST or not mean or not variance:
        raise UserError(f"{source}: damaged: it needs recordings, and a mean and a variance of {width} finite numbers")
    if min(variance) < 0:
        raise UserError(f"{source}: damaged: a variance is below 0")
    voice = Voice(torch.tensor([float(count)]).double(), *(torch.tensor([v]).double() for v in (mean, variance)))
    return SavedVoice(str(content.get("name", ""))[:200], str(content.get("date", ""))[:20], checkpoint, voice)


def _of_another(source: object) -> UserError:
    return UserError(f"{source}: a voice of another checkpoint; enrol the speaker with this one")


def _numbers(values: Any, count: int) -> list[float]:
    """The finite numbers of a list of that length; empty if it is none."""
    if not isinstance(values, list) or len(values) != count:
        return []
    numbers = [float(v) for v in values if isinstance(v, int | float) and abs(v) < MOST]
    return numbers if len(numbers) == count else []
