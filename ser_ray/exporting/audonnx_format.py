"""audonnx: the graph with the one input that audEERING's audonnx can feed, and the model.yaml that it loads.

audonnx gives an input the shape that the graph says, in which only one size may be open: a recording at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from ser_ray.disk import write_text
from ser_ray.exporting import ONNX, PLACE, Options, onnx_format
from ser_ray.exporting.merged import all_merged
from ser_ray.exporting.onnx_format import DTYPES, NOTES, SCRIPT, check, predict
from ser_ray.models.ensemble import Model

__all__ = ["DTYPES", "LIBRARY", "check", "predict", "usage", "write"]

LIBRARY: Final = "audonnx"

OBJECT: Final = "$audonnx.core.model.Model"
"""By this key audonnx knows the file. Without a version, of which it would warn when another is installed."""


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Write model.onnx, model.yaml, and the program that needs neither audonnx nor ser_ray."""
    model = all_merged(directory, options)
    onnx_format.save(model, target, options.dtype, one=True)
    labels = {"probabilities": list(model.experiment.emotions)}
    content = {"path": ONNX, "labels": labels, "transform": None}
    write_text(target / "model.yaml", f"{OBJECT}: {json.dumps(content, ensure_ascii=False)}\n")  # JSON is YAML
    shutil.copyfile(SCRIPT, target / SCRIPT.name)
    return NOTES[options.dtype]


def usage(model: Model) -> str:
    """As `Format.usage`."""
    return (
        "```python\n"
        "import audonnx\n\n"
        f'model = audonnx.load("{PLACE}")\n'
        "model(signal, 16000)  # (T,) float32, mono, 16 kHz -> probabilities (1, emotions) and embedding\n"
        'model.labels("probabilities")\n'
        "```\n\n"
        "Log-mel or normalisation is inside, and so is the temperature. Quiet ends are to be cut before, and "
        f"recordings longer than {model.experiment.audio.max_seconds:g} s to be cut into windows; "
        "`windows` in `onnx_predict.py` beside it does both. What is known of a speaker cannot be given to audonnx; "
        "`--to onnx` has inputs for it."
    )
