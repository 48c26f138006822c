"""page: one HTML file with the model and onnxruntime-web in it, which answers in a browser without any server.

The page is that of `ser-ray serve` (ser_ray/serving/page.html) with data in it: the graph of the format onnx, what the
page says of the model, and two files of onnxruntime-web, which the user brings (``--ort``): this project holds no code
of others. All of it is compressed, and as text, so that one file can be mailed, and opened from a disk.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

import ser_ray
from ser_ray.disk import expanded, readable, write_text
from ser_ray.exporting import ONNX, Options, onnx_format
from ser_ray.exporting.merged import merged
from ser_ray.exporting.onnx_format import DTYPES, NOTES, SCRIPT, check
from ser_ray.exporting.proof import in_fresh_process
from ser_ray.models import about
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.schema import UserError

__all__ = ["DTYPES", "LIBRARY", "check", "predict", "usage", "write"]

LIBRARY: Final = "onnx"
PAGE: Final = "page.html"
TEMPLATE: Final = Path(ser_ray.__file__).with_name("serving") / PAGE
PLACE: Final = "<!-- MODEL -->"
CODE: Final = "ort.wasm.bundle.min.mjs"
WASM: Final = "ort-wasm-simd-threaded.wasm"
"""The files of onnxruntime-web that run on the processor alone: the smallest, and what every browser has."""
VERSION: Final = "1.30.0"
"""Of onnxruntime-web, that this page was tested with."""
HOW: Final = f"npm pack onnxruntime-web@{VERSION} && tar xzf onnxruntime-web-{VERSION}.tgz, then --ort package/dist"


def check_runtime(ort: Path | None) -> None:
    """Raises UserError, before any work, where onnxruntime-web is not given, or is not whole."""
    if ort is None:
        raise UserError(f"--to page puts onnxruntime-web into the page; where npm works: {HOW}")
    if missing := [name for name in (CODE, WASM) if not (_dist(ort) / name).is_file()]:
        raise UserError(f"--ort {readable(ort)}: {missing[0]} is not there; where npm works: {HOW}")


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Write page.html."""
    assert options.ort is not None, "`check_runtime` has looked"
    model, dist = merged(directory, options), _dist(options.ort)
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        onnx_format.save(model, Path(scratch), options.dtype)
        graph = (Path(scratch) / ONNX).read_bytes()
    # In a script element, "</" would end it.
    said = json.dumps(about_model(model, directory), ensure_ascii=False).replace("</", "<\\/")
    parts = {
        "model-onnx": graph,
        "runtime-code": (dist / CODE).read_bytes(),
        "runtime-wasm": (dist / WASM).read_bytes(),
    }
    scripts = [f'<script type="text/plain" id="{name}">{_packed(content)}</script>' for name, content in parts.items()]
    scripts.append(f'<script type="application/json" id="model-about">{said}</script>')
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    write_text(target / PAGE, before + "\n".join(scripts) + after)
    return [*NOTES[options.dtype], "onnxruntime-web, which is in the page, is licensed under MIT by Microsoft."]


def about_model(model: EmotionClassifier, directory: Path) -> dict[str, Any]:
    """What the page says of the model, and what it needs: as an entry of GET /v1/models of `ser-ray serve`."""
    audio = model.experiment.audio
    return about.model_of(model.experiment.name, directory) | {
        "audio": {"trim_db": audio.trim_db, "min_seconds": audio.min_seconds, "max_seconds": audio.max_seconds},
        "width": model.head.embedding_width,
        "least_probability": model.least_probability,
    }


def predict(target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
    """As `Format.predict`: by onnxruntime on the graph that is in the page, as here may be no browser."""
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        (Path(scratch) / ONNX).write_bytes(graph_in((target / PAGE).read_text(encoding="utf-8")))
        return in_fresh_process(SCRIPT, Path(scratch), waveforms)


def graph_in(page: str) -> bytes:
    """The ONNX file that a page holds."""
    found = re.search(r'id="model-onnx">([^<]*)<', page)
    assert found is not None, "`write` has put it there"
    return gzip.decompress(base64.b64decode(found[1]))


def usage(model: EmotionClassifier) -> str:
    """As `Format.usage`."""
    return (
        f"Open `{PAGE}` of this directory in a browser, from the disk or from any web server: Chrome, Edge, Firefox or "
        "Safari of 2023 or later. It records or takes a file, answers in the browser, and sends nothing to anybody. "
        "WAV files are read as by `ser-ray predict`; what else the browser can decode is read at 48 kHz."
    )


# -- below: how it is done


def _dist(ort: Path) -> Path:
    """The folder of the files, of an unpacked package or of its folder dist."""
    given = expanded(ort)
    return given / "dist" if (given / "dist").is_dir() else given


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")
