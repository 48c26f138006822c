"""What was exported of a search's best checkpoint, by the record that lies in every export.

`ser-ray export` writes beside the checkpoint, so an export of ``best/`` is a folder of the results folder, such as
``best-onnx``; one that was written elsewhere in it is found too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ser_ray.evaluation import calibration
from ser_ray.evaluation.layout import ENSEMBLE
from ser_ray.schema import UserError, reason_of

RECORD: Final = "export.json"
"""In every export: what it is of, and its proof. An export without it was not made here, and is never replaced."""
BEST: Final = "best"
"""The folder of the chosen checkpoint."""
PAGE: Final = "page.html"
"""The file to open of an export that is a page."""
_PLACES: Final = (f"*/{RECORD}", f"*/*/{RECORD}")
_DECISIVE: Final = ("head.safetensors", calibration.FILE, ENSEMBLE)
"""Files of a checkpoint that are others when its answers are: a head changes with every weight that is trained."""


@dataclass(frozen=True)
class Export:
    """An export of ``best/``."""

    folder: str
    """Relative to the results folder."""
    format: str
    dtype: str
    made: str
    """The date."""
    bytes: int
    largest: float
    """The largest difference of a probability to that of the checkpoint."""
    limit: float
    compared_on: str
    """The recordings, in words."""
    current: bool
    """Whether it is of the checkpoint that is in ``best/`` now."""
    file: str
    """What to open in the folder; empty where that is the folder itself."""

    @property
    def link(self) -> str:
        """Relative to the results folder, as an address."""
        return quote(f"{self.folder}/{self.file}")


def fingerprint(checkpoint: Path) -> str:
    """Twelve hex digits that are others when the answers of a checkpoint or an ensemble are."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in checkpoint.rglob("*") if path.name in _DECISIVE):
        hasher.update(path.relative_to(checkpoint).as_posix().encode())
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()[:12]


def read_exports(results_dir: Path) -> list[Export]:
    """The exports of ``best/`` in a results folder, by their names. Raises UserError for a damaged record."""
    paths = sorted(path for pattern in _PLACES for path in results_dir.glob(pattern))
    if not paths:
        return []
    now = fingerprint(results_dir / BEST)
    found = [(path, _content(path)) for path in paths]
    return [_export(path, content, results_dir, now) for path, content in found if _is_of_best(content)]


# -- below: how it is done


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None
    return content if isinstance(content, dict) else {}


def _is_of_best(content: Mapping[str, Any]) -> bool:
    return str(content.get("checkpoint")).rpartition("/")[2] == BEST


def _export(path: Path, content: Mapping[str, Any], results_dir: Path, now: str) -> Export:
    try:
        proof = content["proof"]
        return Export(
            folder=path.parent.relative_to(results_dir).as_posix(),
            format=str(content["format"]),
            dtype=str(content["dtype"]),
            made=str(content["made"]),
            bytes=int(content["bytes"]),
            largest=float(proof["largest"]),
            limit=float(proof["limit"]),
            compared_on=str(proof["on"]),
            current=content.get("fingerprint") == now,
            file=PAGE if (path.parent / PAGE).is_file() else "",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not the record of an export ({reason_of(error, 80)}); export again or remove its folder")
