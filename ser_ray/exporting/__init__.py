"""A trained model for other programs: each format is a module of this folder, that the table below names.

A format writes a directory and says how a stranger would predict with it; `ser_ray.exporting.proof` compares that with
`ser-ray predict`, and `ser_ray.exporting.card` describes it. What all formats start from is the model of `merged`:
the checkpoint in fp32, without quantisation, its low-rank updates added to the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from ser_ray.evaluation.exports import RECORD
from ser_ray.schema import UserError

if TYPE_CHECKING:
    import numpy as np

    from ser_ray.models.ensemble import Model

FORMATS: Final = {
    "hf": "ser_ray.exporting.huggingface",
    "onnx": "ser_ray.exporting.onnx_format",
    "audonnx": "ser_ray.exporting.audonnx_format",
    "page": "ser_ray.exporting.page_format",
    "peft": "ser_ray.exporting.adapter",
}
"""Name of a format -> its module, a `Format`. Strings, so that `ser-ray --help` imports no torch."""
OF_ENSEMBLES: Final = ("onnx", "audonnx")
"""Formats that hold several models as one."""
PLACE: Final = "THIS_DIRECTORY"
"""In a card, in place of where the export is."""
ORIGINAL: Final = "original"
QUANTISED: Final = "quantised"
ONNX: Final = "model.onnx"
"""The file of the formats onnx and audonnx."""


@dataclass(frozen=True)
class Options:
    """What a user asks of an export."""

    dtype: str = "fp32"
    """One of the format's `DTYPES`."""
    backbone: str | None = None
    """Where the checkpoint's backbone is now, if that has moved."""
    base: str = ORIGINAL
    """What low-rank updates are added to; one of `merged.bases`."""
    ort: Path | None = None
    """The folder of onnxruntime-web, for a page."""


class Format(Protocol):
    """What a module of this folder has that is a format."""

    DTYPES: tuple[str, ...]
    """What ``--dtype`` may be."""
    LIBRARY: str
    """The library that loads it, as the hub names it."""

    def check(self, model: Model) -> None:
        """Raises UserError for a checkpoint that this format cannot hold; ``model`` is of `merged.reference`, and an
        ensemble only for formats of `OF_ENSEMBLES`."""

    def write(self, directory: Path, target: Path, options: Options) -> list[str]:
        """Write the checkpoint in ``directory`` to the new folder ``target``. Returns sentences that a reader of the
        export has to know."""

    def predict(self, target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
        """Probabilities (N, K) of recordings, each (T,) float32 at 16 kHz, as a fresh process gets them from
        ``target`` alone (`proof.in_fresh_process`). The checkpoint in ``directory`` is for what the export leaves to
        its user."""

    def usage(self, model: Model) -> str:
        """How to use the export, in Markdown, for its card; `PLACE` stands for its place."""


def of(name: str) -> Format:
    """The format of that name."""
    return cast(Format, importlib.import_module(FORMATS[name]))


def onnx_of(path: Path) -> Path | None:
    """The ONNX file that a user means by a path: that file, or the export in that folder; None for a checkpoint.

    Raises UserError for an export of another format.
    """
    if path.suffix.lower() == ".onnx":
        return path
    if (path / "experiment.yaml").is_file():
        return None
    if not (path / ONNX).is_file() and (path / RECORD).is_file():
        raise UserError(f"{path}: an export for other programs (README.md in it); give the checkpoint, or one to onnx")
    return path / ONNX if (path / ONNX).is_file() else None
