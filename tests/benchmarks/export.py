"""Exports beside their checkpoints: the largest difference of a probability, sizes, and milliseconds an utterance.

    python tests/benchmarks/export.py [--families whisper] [--backbones DIR ...] [--done ROWS.jsonl]
        > results/benchmarks/export.md

The first table: tiny random backbones of the four families under every head, adapted in every way, with random updates
far larger than trained ones. Each checkpoint is exported, and all exports of a row are loaded by one fresh process in
which ser_ray cannot be imported; both answer recordings of 0.31 to 3.1 s. hf is asked through transformers' pipeline,
onnx by the program that is written beside it. A cell is the largest difference over recordings, emotions and poolings
(mean, statistics, attentive; the first with a hidden layer of 8). qlora is merged on what its 4 bits stand for, and,
in the rows "on the original weights", on these: random weights of width 32 lose far more in 4 bits than trained ones.

The second table: backbones of real size with an untrained adapter and head. MB are of all files of an export; that of
the checkpoint is without its backbone. Milliseconds are the fastest of the rounds for one recording of 3 s at 16 kHz on
one thread of a CPU: torch is the checkpoint's own forward pass, without decoding and trimming; hf is transformers'
pipeline, and onnx the program beside it, with trimming.

With ``--done`` rows are kept in a file as they are finished, and those that are in it are not made again: the table
may be made in several runs, and the page has all rows of the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from backbone_fixtures import noise, trained, write_backbone

from ser_ray import exporting
from ser_ray.exporting import ONNX, ORIGINAL, QUANTISED, Options, graph, huggingface, onnx_format, onnx_predict, proof
from ser_ray.exporting.merged import merged
from ser_ray.models import checkpoint
from ser_ray.models.classifier import EmotionClassifier
from ser_ray.schema import SAMPLING_RATE
from ser_ray.training.inference import predict

FAMILIES: Final = {
    "wav2vec2": "wav2vec2-group",
    "hubert": "hubert-noproj",
    "wavlm": "wavlm-layer",
    "whisper": "whisper",
}
"""Family -> the variant of `backbone_fixtures`: norms before and after the blocks, with and without that of groups."""
MIXES: Final = ("last", "weighted", "concat")
POOLINGS: Final = {"mean": 8, "statistics": 0, "attentive": 0}
"""Pooling -> width of the hidden layer beside it."""
LORA: Final = {"rank": 2, "alpha": 4}
WAYS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "frozen": ({"method": "frozen"}, ORIGINAL),
    "LoRA": ({"method": "lora", **LORA}, ORIGINAL),
    "QLoRA": ({"method": "qlora", **LORA}, QUANTISED),
    "QLoRA, on the original weights": ({"method": "qlora", **LORA}, ORIGINAL),
    "full": ({"method": "full"}, ORIGINAL),
}
"""How the backbone is adapted, and what its updates are merged on."""
SECONDS: Final = (0.31, 0.9, 3.1, 0.9)
COLUMNS: Final = (("hf", "fp32"), *(("onnx", dtype) for dtype in onnx_format.DTYPES))
"""Formats of the first table: peft is proven through hf, and audonnx and a page have the graph of onnx."""

_LOOP: Final = (
    "import sys; sys.modules['ser_ray'] = None; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
    "import importlib; program = importlib.import_module(sys.argv[2]); "
    "[program.main(one, sys.argv[3], one + '.npy') for one in sys.argv[4:]]"
)


def answers(model: EmotionClassifier, waveforms: Sequence[np.ndarray]) -> np.ndarray:
    """(N, K), as `ser-ray predict`."""
    found = predict(model, [(waveform, SAMPLING_RATE) for waveform in waveforms])
    return np.array([list(answer.probabilities.values()) for answer in found])


def asked(script: Path, targets: Sequence[Path], waveforms: Sequence[np.ndarray], scratch: Path) -> list[np.ndarray]:
    """What the script answers for several exports, in one fresh process."""
    arrays: dict[str, Any] = {str(number): waveform for number, waveform in enumerate(waveforms)}
    np.savez(scratch / "recordings.npz", **arrays)
    command = [sys.executable, "-c", _LOOP, str(script.parent), script.stem, str(scratch / "recordings.npz")]
    own = os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")}
    subprocess.run([*command, *map(str, targets)], check=True, capture_output=True, env=own)
    return [np.load(f"{target}.npy") for target in targets]


def differences(family: str, way: str, scratch: Path) -> list[str]:
    """A row of the first table: for every format and layer mix the largest difference."""
    backbone = scratch / "backbone"
    if not backbone.exists():
        write_backbone(FAMILIES[family], backbone)
    adapter, base = WAYS[way]
    waveform_BT, lengths_B = noise(SECONDS)
    waveforms = [waveform_T[:length].numpy() for waveform_T, length in zip(waveform_BT, lengths_B, strict=True)]
    heads = [(mix, pooling, hidden) for mix in MIXES for pooling, hidden in POOLINGS.items()]
    expected, targets = [], {column: [] for column in COLUMNS}  # type: tuple[list[np.ndarray], dict[Any, list[Path]]]
    for mix, pooling, hidden in heads:
        name = f"{way.partition(',')[0]}-{base}-{mix}-{pooling}"
        head = {"layer_mix": mix, "pooling": pooling, "hidden": hidden}
        folder = trained(scratch / name, backbone, adapter=adapter, head=head)
        expected.append(answers(checkpoint.load(folder, "cpu", precision="fp32"), waveforms))
        traced = graph.traced(merged(folder, Options(base=base)))
        for column in COLUMNS:
            targets[column].append(folder.with_name("-".join([name, *column])))
            if column[0] == "hf":
                huggingface.write(folder, targets[column][-1], Options(base=base))
            else:
                onnx_format.save_traced(traced.clone(), targets[column][-1], column[1])
    cells = []
    for column in COLUMNS:
        script = exporting.of(column[0]).SCRIPT  # type: ignore[attr-defined]
        found = asked(script, targets[column], waveforms, scratch)
        apart = [proof.compare(ours, theirs).largest for ours, theirs in zip(expected, found, strict=True)]
        cells += [f"{max(apart[first : first + len(POOLINGS)]):.0e}" for first in range(0, len(heads), len(POOLINGS))]
    return cells


def sizes_and_times(backbone: str, rounds: int, scratch: Path) -> Iterator[str]:
    """The rows of the second table for one backbone."""
    adapter = {"method": "lora"}
    folder = trained(
        scratch / "best", backbone, adapter=adapter, head={"layer_mix": "weighted", "pooling": "statistics"}
    )
    model = checkpoint.load(folder, "cpu", precision="fp32")
    waveform_BT, lengths_B = noise((3.0,))
    with torch.inference_mode():
        ms = milliseconds(lambda: model(waveform_BT, lengths_B, padded=False), rounds)
    name = Path(backbone).name
    yield f"| {name} | checkpoint (torch) | {megabytes(folder):.1f} | - | {ms:.0f} |"
    for form_name, dtype in (COLUMNS[0], ("hf", "fp16"), *COLUMNS[1:]):
        form, options = exporting.of(form_name), Options(dtype)
        target = scratch / f"{form_name}-{dtype}"
        form.write(folder, target, options)
        apart = proof.compare(
            answers(model, list(waveform_BT.numpy())),
            form.predict(target, folder, list(waveform_BT.numpy()), options),
        ).largest
        ms = milliseconds(asker(form_name, target, waveform_BT[0].numpy()), rounds)
        yield f"| {name} | {form_name} {dtype} | {megabytes(target):.1f} | {apart:.0e} | {ms:.0f} |"


def asker(name: str, target: Path, waveform: np.ndarray) -> Callable[[], object]:
    """What answers one recording with a loaded export."""
    if name == "hf":
        ask = transformers.pipeline("audio-classification", model=str(target), trust_remote_code=True, device="cpu")
        return lambda: ask({"raw": waveform, "sampling_rate": SAMPLING_RATE})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(target / ONNX), options, providers=["CPUExecutionProvider"])
    return lambda: onnx_predict.answer(session, waveform)


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """The fastest of the rounds, after one that does not count."""
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)


def megabytes(folder: Path) -> float:
    """Of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def kept(path: Path | None, key: str, make: Callable[[], list[str]]) -> list[str]:
    """Lines of the page that are made once: from the file if they are in it, and else added to it."""
    rows = dict(json.loads(line) for line in path.read_text().splitlines()) if path and path.exists() else {}
    if key not in rows:
        print(key, file=sys.stderr, flush=True)
        rows[key] = make()
        if path:
            with path.open("a") as file:
                file.write(json.dumps([key, rows[key]]) + "\n")
    found: list[str] = rows[key]
    return found


def in_scratch(make: Callable[[Path], list[str]]) -> list[str]:
    """Lines that need a folder for the time being."""
    with tempfile.TemporaryDirectory() as scratch:
        return make(Path(scratch))


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--backbones", nargs="*", default=["embedded/tiny-whisper", "embedded/tiny-wav2vec2"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--done", type=Path)
    given = parser.parse_args()
    about = (__doc__ or "").split("\n\n")
    command = shlex.join(["python", "tests/benchmarks/export.py", *sys.argv[1:]])
    print(f"# Exports\n\n{about[0]}\n\n```\n{command} > results/benchmarks/export.md\n```\n\n{about[2].strip()}\n")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, onnxruntime {onnxruntime.__version__}.\n")
    titles = " | ".join(f"{name} {dtype}, {mix}" for name, dtype in COLUMNS for mix in MIXES)
    print(f"| family | adapted | {titles} |\n|---|---|{'---|' * len(COLUMNS) * len(MIXES)}")
    for family in given.families:
        for way in given.ways:
            make = functools.partial(in_scratch, functools.partial(differences, family, way))
            cells = kept(given.done, f"{family}, {way}", make)
            print(f"| {family} | {way} | {' | '.join(cells)} |", flush=True)
    print(f"\n{about[3].strip()}\n\n| backbone | | MB | largest difference | ms of 3 s |\n|---|---|---|---|---|")
    for backbone in given.backbones:
        rows = functools.partial(
            in_scratch, lambda scratch, b=backbone: list(sizes_and_times(b, given.rounds, scratch))
        )
        for line in kept(given.done, backbone, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
