"""The classifier, or an ensemble of several, as one ONNX graph.

    waveform (batch, samples) float32, lengths (batch,) int64  ->  probabilities (batch, K), embedding (batch, P)

The waveform is at 16 kHz and zero beyond ``lengths`` samples; both axes are of any size. Everything that the backbone
wants, such as log-mel or zero mean and unit variance, is in the graph, and so is the temperature. What comes before is
not: decoding, trimming, and the cut into windows, whose settings are in the metadata of the file (`described`).

Where the head uses what is known of a speaker, there are three more inputs that may be left out, for one speaker of all
rows (voices = 1) or one of each: voice_count (voices,), voice_mean and voice_variance (voices, P), all float32. They
are a `ser_ray.models.voice.Voice`; the embedding is what such a voice is made of. Of an ensemble P is the sum over its
members, whose embeddings and voices stand side by side; a backbone that members share is in the graph once.

torch's exporter (by torch.export) traces the graph, onnxscript folds its constants and merges its nodes, and ONNX's own
checker reads the file that is written.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ser_ray import __version__
from ser_ray.models.backbones import Backbone, Whisper
from ser_ray.models.ensemble import Ensemble, Model, members_of, uses_voices, widths_of
from ser_ray.models.pretrained import shown
from ser_ray.models.voice import Voice
from ser_ray.models.voice_file import digest
from ser_ray.schema import SAMPLING_RATE, UserError

INSTALL: Final = "pip install 'ser-ray[onnx]'"
OUTPUTS: Final = ("probabilities", "embedding")
VOICE: Final = ("voice_count", "voice_mean", "voice_variance")
LARGEST: Final = 1_900_000_000
"""Bytes of weights that a file holds by itself: protobuf ends at 2 GiB. More lie beside it, in FILE.data."""
BACKBONE: Final = re.compile(r"(answering\.)?members\.\d+\.backbone\.model")
"""The scope, in torch's names, of the weights that may be held in fewer bits; front end and head stay in fp32, as they
do in training."""
_SCOPES: Final = "pkg.torch.onnx.name_scopes"


class Answering(nn.Module):
    """A model with the inputs and outputs of the graph.

    The product of the members' probabilities, each to the power of its weight, is the softmax of the sum of their
    logits, each times its weight.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        members = members_of(model)
        weights, temperature = (model.weights, model.temperature) if isinstance(model, Ensemble) else ((1.0,), 1.0)
        self.members = nn.ModuleList(members)
        self.scales = [w / (m.temperature * temperature) for w, m in zip(weights, members, strict=True)]
        self.widths = widths_of(model)
        self.uses_voices = [member.head.speaker is not None for member in members]
        self.stops: dict[int, int] = {}
        """Of each backbone, by its id, the block from which on none of its members needs any."""
        for member in members:
            own = member.backbone.num_layers if member.stop is None else member.stop
            self.stops[id(member.backbone)] = max(own, self.stops.get(id(member.backbone), 0))

    def forward(
        self,
        waveform_BT: torch.Tensor,
        lengths_B: torch.Tensor,
        voice_count: torch.Tensor | None = None,
        voice_mean: torch.Tensor | None = None,
        voice_variance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the module says: probabilities and embedding."""
        states: dict[int, Any] = {}  # of each backbone, which several members may have
        logits, embeddings = [], []
        voices = self._voices(voice_count, voice_mean, voice_variance)
        for member, scale, voice in zip(self.members, self.scales, voices, strict=True):
            model: Any = member
            if id(model.backbone) not in states:
                states[id(model.backbone)] = model.backbone(waveform_BT, lengths_B, stop=self.stops[id(model.backbone)])
            embeddings.append(model.head.embed(*states[id(model.backbone)]))
            logits.append(scale * model.head.classify(model.head.relative(embeddings[-1], voice)))
        return torch.stack(logits).sum(0).softmax(-1), torch.cat(embeddings, dim=-1)

    def _voices(
        self, count: torch.Tensor | None, mean: torch.Tensor | None, variance: torch.Tensor | None
    ) -> list[Voice | None]:
        """What each member gets of a voice: its part, or nothing where its head makes nothing of it."""
        if count is None or mean is None or variance is None:
            return [None] * len(self.members)
        parts = zip(mean.split(self.widths, dim=-1), variance.split(self.widths, dim=-1), strict=True)
        return [Voice(count, *part) if uses else None for part, uses in zip(parts, self.uses_voices, strict=True)]


class Spectrogram(nn.Module):
    """The power spectrogram (B, bins, frames) of Whisper's front end as one convolution.

    With onnxruntime's own short-time Fourier transform probabilities of the demo's winner differed by up to 2e-4 from
    those of torch; with this one by less than 1e-5.
    """

    def __init__(self, window: torch.Tensor, hop: int) -> None:
        super().__init__()
        self.hop, self.side = hop, len(window) // 2
        angle_KT = (
            2 * torch.pi / len(window) * torch.arange(self.side + 1)[:, None] * torch.arange(len(window)).double()
        )
        waves_KT = torch.cat([angle_KT.cos(), angle_KT.sin()]) * window.double()
        self.register_buffer("waves_K1T", waves_KT[:, None].float())

    waves_K1T: torch.Tensor

    def forward(self, waveform_BT: torch.Tensor) -> torch.Tensor:
        """Of waveforms that are mirrored at both ends, as torch.stft does with ``center``."""
        padded_B1T = nn.functional.pad(waveform_BT[:, None], (self.side, self.side), mode="reflect")
        parts_BKF = nn.functional.conv1d(padded_B1T, self.waves_K1T, stride=self.hop)
        real_BKF, imaginary_BKF = parts_BKF.square().chunk(2, dim=1)
        return real_BKF + imaginary_BKF


class AnsweringOne(nn.Module):
    """The same for one recording (1, samples), whose length is that of the array: what audonnx can feed."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.answering = Answering(model)

    def forward(self, waveform_1T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities (1, K) and embedding (1, P)."""
        probabilities_1K, embedding_1P = self.answering(waveform_1T, torch.full((1,), waveform_1T.shape[1]))
        return probabilities_1K, embedding_1P


def traced(model: Model, one: bool = False) -> Any:
    """The graph of a model that is `merged`, as onnx_ir has it; the model's front end is changed for it. ``one``: that
    of `AnsweringOne`.

    Raises UserError where a library is missing that the extra ``onnx`` brings.
    """
    check_installed()
    for backbone in {id(member.backbone): member.backbone for member in members_of(model)}.values():
        if isinstance(backbone, Whisper):
            mel: Any = backbone.logmel.mel
            mel.spectrogram = Spectrogram(mel.spectrogram.window, mel.hop_length)
    wrapped = (AnsweringOne if one else Answering)(model).eval()
    with _quiet(), torch.no_grad():
        inputs, names, shapes = _examples(model, one)
        program = torch.onnx.export(
            wrapped,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=[f"output_{name}" for name in OUTPUTS],  # the graph has values of its own by these names
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None, "torch returns one where it traces"
    graph = program.model.graph
    for value in (output for node in graph for output in node.outputs if output.name in OUTPUTS):
        value.name = f"{value.name}_inside"
    for value, name in zip(graph.outputs, OUTPUTS, strict=True):
        value.name = name
    if not one and uses_voices(model):
        _make_optional(graph)
    program.model.producer_name, program.model.producer_version = "ser_ray", __version__
    program.model.metadata_props.update(described(model))
    return program.model


def described(model: Model) -> dict[str, str]:
    """What a program has to know besides the graph, as its metadata: JSON in strings."""
    experiment, audio, members = model.experiment, model.experiment.audio, members_of(model)
    content = {
        "labels": list(experiment.emotions),
        "sampling_rate": SAMPLING_RATE,
        "audio": {"trim_db": audio.trim_db, "min_seconds": audio.min_seconds, "max_seconds": audio.max_seconds},
        "normalisation": " + ".join(dict.fromkeys(_normalisation(member.backbone) for member in members)),
        "temperature": model.temperature,
        "least_probability": model.least_probability,
        "name": experiment.name,
        "backbone": " + ".join(dict.fromkeys(shown(member.experiment.backbone) for member in members)),
        "widths": widths_of(model),
        "head": digest(model),
    }
    return {key: json.dumps(value) for key, value in content.items()}


def save(graph: Any, path: Path) -> None:
    """Write a graph, and check the file as ONNX's own checker does, with the shapes of all nodes."""
    import onnx
    import onnx_ir

    for node in graph.graph:  # each says where in torch's and our code, on this machine, it comes from
        node.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(graph, path, external_data=f"{path.name}.data" if size > LARGEST else None)
    onnx.checker.check_model(str(path), full_check=True)


def check_installed() -> None:
    """Raises UserError where what the extra ``onnx`` brings is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}, which is missing: {INSTALL}") from None


def of_backbone(node: Any) -> bool:
    """Whether a node computes with weights of the backbone, not in its front end or in the head."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return any(BACKBONE.match(scope) for scope in scopes)


# -- below: how it is done


def _normalisation(backbone: Backbone) -> str:
    whole = bool(getattr(backbone, "normalize", False))  # Whisper has another front end
    normalised = "zero mean and unit variance of every utterance" if whole else "none"
    return "log-mel" if backbone.family == "whisper" else normalised


def _examples(model: Model, one: bool) -> tuple[tuple[torch.Tensor, ...], list[str], Any]:
    """Inputs to trace with, their names, and which of their axes are of any size."""
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples")
    lengths_B = torch.tensor([SAMPLING_RATE, SAMPLING_RATE * 3 // 4])
    waveform_BT = 0.1 * torch.sin(torch.arange(SAMPLING_RATE) / 10).repeat(2, 1)
    if one:
        return (waveform_BT[:1],), ["waveform"], ({1: samples},)
    inputs, shapes = (waveform_BT, lengths_B), ({0: batch, 1: samples}, {0: batch})
    if not uses_voices(model):
        return inputs, ["waveform", "lengths"], shapes
    none = (torch.zeros(1), *torch.zeros(2, 1, sum(widths_of(model))))
    return (*inputs, *none), ["waveform", "lengths", *VOICE], (*shapes, {}, {}, {})


def _make_optional(graph: Any) -> None:
    """Give the inputs of a voice their default, nobody is known, and an axis of any size in place of 1: what is
    computed of them is broadcast over the batch."""
    import onnx_ir

    for value in (value for value in graph.inputs if value.name in VOICE):
        sizes = list(value.shape)
        value.const_value = onnx_ir.tensor(torch.zeros(*sizes).numpy(), name=value.name)
        value.shape = onnx_ir.Shape(["voices", *sizes[1:]])
        graph.register_initializer(value)
    # The exporter's notes of the shapes in between say 1 as well.
    for output in (output for node in graph for output in node.outputs if not output.is_graph_output()):
        output.shape = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of axes that have the same name, and of libraries that this project never uses."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
