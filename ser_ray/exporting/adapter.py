"""peft: the low-rank updates alone, in PEFT's layout, with a card and without the path of any machine.

The classifier is not in it: who wants emotions exports to hf. So its proof adds the encoder's base and the classifier:
the updates are merged by PEFT in a fresh process, into an export of the same checkpoint without them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ser_ray.disk import read_json, write_json
from ser_ray.exporting import QUANTISED, Options, huggingface
from ser_ray.exporting.merged import without_updates
from ser_ray.exporting.proof import in_fresh_process
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.models.pretrained import on_hub, shown
from ser_ray.schema import UserError

DTYPES: Final = ("fp32",)
LIBRARY: Final = "peft"
NF4: Final = '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`'


def check(model: EmotionClassifier) -> None:
    """Raises UserError for a checkpoint without low-rank updates."""
    adapter = model.experiment.adapter
    if adapter.method not in ("lora", "qlora"):
        raise UserError(f"--to peft: this checkpoint has no adapter (adapter.method: {adapter.method}); use --to hf")
    huggingface.check(model)


def write(directory: Path, target: Path, options: Options) -> list[str]:
    """Copy the updates, and their configuration with the backbone by its name."""
    target.mkdir(parents=True)
    shutil.copy(directory / "adapter" / "adapter_model.safetensors", target)
    content = read_json(directory / "adapter" / "adapter_config.json")
    base = str(content["base_model_name_or_path"])
    write_json(target / "adapter_config.json", content | {"base_model_name_or_path": shown(base)})
    notes = []
    if not on_hub(base):
        notes.append(f"The base, {shown(base)}, is a folder, which is not on the hub: load it from where it is.")
    if options.base == QUANTISED:
        notes.append(f"Load the base in 4 bits, over which the updates were trained: {NF4}.")
    return notes


def predict(target: Path, directory: Path, waveforms: Sequence[np.ndarray], options: Options) -> np.ndarray:
    """As `Format.predict`: by PEFT, which merges the updates into the base."""
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        base = Path(scratch) / "base"
        huggingface.save(without_updates(directory, options), base)
        return in_fresh_process(huggingface.SCRIPT, base, waveforms, str(target))


def usage(model: EmotionClassifier) -> str:
    """As `Format.usage`."""
    whisper = model.backbone.family == "whisper"
    name = shown(model.experiment.backbone)
    load = "WhisperModel" if whisper else "AutoModel"
    return (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {load}\n\n"
        f'encoder = {load}.from_pretrained("{name}"){".get_encoder()" if whisper else ""}\n'
        'encoder = PeftModel.from_pretrained(encoder, "THIS_DIRECTORY").merge_and_unload()\n'
        "```\n\n"
        "The encoder alone, adapted to emotions of speech; the classifier is in the other exports. Merge before use: "
        "the attention of WavLM in transformers bypasses updates that are not merged."
    )
