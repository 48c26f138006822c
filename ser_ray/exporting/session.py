"""An exported model.onnx in place of a checkpoint: onnxruntime computes, and all that comes before is what `ser-ray
predict` does with a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ser_ray.config import Audio
from ser_ray.disk import readable
from ser_ray.exporting.graph import INSTALL, VOICE
from ser_ray.models.voice import Voice
from ser_ray.schema import SAMPLING_RATE, UserError, reason_of
from ser_ray.speech.pieces import Source, pieces_of
from ser_ray.speech.stream import Batch
from ser_ray.training.inference import Answer, Known, Windows, answered, by_batch, with_whole

BATCH_SECONDS: Final = 60.0
"""Of audio that is computed together, with padding, as `Experiment.batch_seconds` by default."""


class OnnxClassifier:
    """A model of `ser-ray export` on onnxruntime."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is none, and where onnxruntime is missing."""
        self.path = path
        self.session = _session(path)
        optional = self.session.get_overridable_initializers()  # inputs that may be left out
        self.inputs = {one.name for one in (*self.session.get_inputs(), *optional)}
        settings = self.session.get_modelmeta().custom_metadata_map
        try:
            self.emotions: list[str] = [str(label) for label in json.loads(settings["labels"])]
            self.audio = Audio.model_validate(json.loads(settings["audio"]))
            self.head = str(json.loads(settings["head"]))
            self.widths: list[int] = [int(width) for width in json.loads(settings["widths"])]
            self.least_probability: float | None = json.loads(settings["least_probability"])
            if json.loads(settings["sampling_rate"]) != SAMPLING_RATE or "waveform" not in self.inputs:
                raise ValueError("another input")
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{readable(path)}: not a model of ser-ray export: it does not say its {reason_of(error, 80)}"
            ) from None

    @property
    def uses_voices(self) -> bool:
        """Whether it has inputs for what is known of a speaker."""
        return set(VOICE) <= self.inputs

    def predict(self, sources: Sequence[Source], voice: Known = None) -> Iterator[Answer]:
        """As `ser_ray.training.inference.predict`."""
        whole = _side_by_side([voice] if isinstance(voice, Voice) else voice) if voice else None

        def run(windows: Windows) -> np.ndarray:
            return by_batch(windows, len(self.emotions), BATCH_SECONDS, lambda batch: self.probabilities(batch, whole))

        yield from with_whole(answered(pieces_of(self.audio, sources), self.emotions, run))

    def probabilities(self, batch: Batch, voice: Voice | None = None) -> np.ndarray:
        """(B, K) float32 of a batch of waveforms; ``voice``: what is known of the one speaker of all."""
        if "lengths" not in self.inputs:  # of audonnx, which has no batches
            parts = [self._run({"waveform": w[None, :n]}) for w, n in zip(batch.inputs, batch.lengths_B, strict=True)]
            return np.concatenate(parts)
        known = dict(zip(VOICE, (part.float() for part in voice), strict=True)) if voice else {}
        return self._run({"waveform": batch.inputs, "lengths": batch.lengths_B} | known)

    def _run(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        (found_BK,) = self.session.run(["probabilities"], {name: tensor.numpy() for name, tensor in inputs.items()})
        found: np.ndarray = found_BK
        return found


# -- below: how it is done


def _side_by_side(voices: Sequence[Voice]) -> Voice:
    """The voices that the members of an ensemble have of one speaker, as the graph takes them."""
    means, variances = ([getattr(voice, name) for voice in voices] for name in ("mean_BP", "variance_BP"))
    return Voice(voices[0].count_B, torch.cat(means, dim=1), torch.cat(variances, dim=1))


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{readable(path)}: it needs onnxruntime, which is missing: {INSTALL}") from None
    if not path.is_file():
        raise UserError(f"{readable(path)}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of inputs that may be left out
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a damaged file onnxruntime raises errors of many kinds
        raise UserError(f"{readable(path)}: not readable as ONNX: {reason_of(error, 160)}") from None
