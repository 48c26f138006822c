"""What a training step costs before any clock: kernels dispatched a block, and bytes kept for the backward pass.

    python tests/benchmarks/steps.py [--against CHECKOUT] [--whisper DIR] [--out DIRECTORY]

Counted on a CPU, for every family and method, in bf16 as on a GPU: results/benchmarks/steps.md and steps.json. A card
waits for kernels to be launched long before its arithmetic is at its limit, so the number of kernels predicts what a
step takes there; the bytes bound the batch. No network, no Ray; a minute.

Kernels: operations that reach torch's dispatcher in forward and backward, but for views, and for what only reserves
memory. Those of a block are those of a model of three blocks less those of a model of two: the block, and what a head
that mixes all layers does with its output. A CPU decomposes some: where attention has dropout (wav2vec2, HuBERT) a GPU
has one kernel in place of about twenty.
Kept: what autograd saves, each storage once. Of a batch of twice the utterances less the batch, so that weights and
copies of them do not count, and again of three blocks less two.

With ``--against``, another checkout of this project is counted too, in a process of its own. With ``--whisper`` as
well, both train that encoder (or its shape in random weights, if DIR is ``random``) by turns, in fp32 and in bf16, and
utterances per second are compared, by the clock and by the time that a process had a core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

import gpu_cells
import torch
import transformers
from dispatched import Kernels

from ser_ray.config import Experiment
from ser_ray.disk import write_json, write_text
from ser_ray.models import backbones
from ser_ray.models.classifier import EmotionClassifier, build
from ser_ray.models.precision import autocast, compute_dtype
from ser_ray.runtime import feed
from ser_ray.speech import stream
from ser_ray.training import loop

FAMILIES: Final = ("whisper", "wav2vec2", "hubert", "wavlm")
METHODS: Final = ("frozen", "full", "lora", "qlora")
TIMED: Final = (("lora", "fp32"), ("qlora", "fp32"), ("lora", "bf16"), ("qlora", "bf16"))
WIDTH, HEADS = 256, 4
SECONDS: Final = (3.0, 2.5, 1.5, 3.0)
"""Of the utterances of a batch: 12 s with padding."""
TURNS, UTTERANCES, TIMED_EPOCHS = 3, 16, 2

Counts = dict[str, dict[str, dict[str, float]]]
"""Family, method -> ``kernels``, and ``kept_mb`` for 100 s of audio."""
Rates = dict[str, dict[str, list[tuple[float, float]]]]
"""What is timed, ``now`` or ``before`` -> `rate` of every turn."""


@contextmanager
def kept() -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd saves for a backward pass, each storage once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())


def speech(times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """waveform_BT and lengths_B of `SECONDS`, so many times over."""
    lengths_B = (16_000 * torch.tensor(SECONDS * times)).long()
    waveform_BT = torch.randn(len(lengths_B), int(lengths_B.max()), generator=torch.Generator().manual_seed(0))
    return waveform_BT * backbones.frame_mask(lengths_B, waveform_BT.shape[1]), lengths_B


def step(model: EmotionClassifier, times: int) -> tuple[int, int]:
    """Kernels of forward and backward, and the bytes kept between them."""
    model.zero_grad(set_to_none=True)
    waveform_BT, lengths_B = speech(times)
    with Kernels() as kernels:
        with kept() as held, autocast("bf16", "cpu"):
            logits_BK = model(waveform_BT, lengths_B)
        logits_BK.sum().backward()
    return kernels.names.total(), held()


def count(family: str, method: str) -> dict[str, float]:
    """Of one more block."""
    found = []
    for blocks in (2, 3):
        with tempfile.TemporaryDirectory() as scratch:
            shape = (blocks, WIDTH, HEADS, 80 if family == "whisper" else 16)
            backbone = gpu_cells.write_backbone(family, shape, Path(scratch))
            described = _described(backbone, method, precision="bf16")
            # Earlier checkouts computed with 4-bit weights in fp32 on a CPU, whatever the precision.
            with mock.patch.object(backbones, "nf4_dtype", compute_dtype, create=True):
                model = build(described).train()
        step(model, 1)  # what is done once only
        (kernels, once), (_, twice) = step(model, 1), step(model, 2)
        found.append((kernels, twice - once))
    seconds = max(SECONDS) * len(SECONDS)
    (fewer, less), (more, larger) = found
    return {"kernels": more - fewer, "kept_mb": (larger - less) / 1e6 * 100 / seconds}


def rate(backbone: Path, method: str, precision: str) -> tuple[float, float]:
    """Utterances per second of `loop.fit` in the epochs after the first, in steps of 20 s as speed.py has them: by the
    clock, and by the seconds that the process had a core."""
    epochs = 1 + TIMED_EPOCHS
    described = _described(backbone, method, epochs=epochs, patience=epochs, precision=precision)
    table = gpu_cells.as_table(gpu_cells.speech(UTTERANCES))
    own = feed.data(described, stream.Held(table), stream.Held(table.slice(0, 1)), stream.SPEECH)
    times: list[tuple[float, float]] = []

    def train(epoch: int) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        return own.train(epoch)

    def dev() -> Any:
        times.append((time.perf_counter(), time.process_time()))
        return own.dev()

    loop.fit(build(described), replace(own, train=train, dev=dev), lambda record, save: None)
    epochs = list(zip(times[2::2], times[3::2], strict=True))
    assert len(epochs) == TIMED_EPOCHS
    clock, core = (sum(end[which] - start[which] for start, end in epochs) for which in (0, 1))
    return UTTERANCES * TIMED_EPOCHS / clock, UTTERANCES * TIMED_EPOCHS / core


def answer(request: list[str]) -> Any:
    """For the process of another checkout: ``count FAMILY METHOD`` or ``rate DIRECTORY METHOD PRECISION``."""
    verb, what, *how = request
    return count(what, *how) if verb == "count" else rate(Path(what), *how)


class Checkout:
    """A process that answers for the ser_ray of another checkout, by the scripts of this one."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--answer"],
            env=os.environ | {"PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *request: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{request}: the process of the other checkout has ended")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def every_count(ask: Callable[..., Any]) -> Counts:
    """All families and methods."""
    return {family: {method: ask("count", family, method) for method in METHODS} for family in FAMILIES}


def by_turns(whisper: Path, other: Callable[..., Any]) -> Rates:
    """The rates of both, turn by turn; a busy machine slows both of a turn."""
    found: Rates = {", ".join(how): {"now": [], "before": []} for how in TIMED}
    sides = {"now": rate, "before": lambda directory, *how: tuple(other("rate", str(directory), *how))}
    for turn in range(TURNS):
        for how, rates in zip(TIMED, found.values(), strict=True):
            for name in sorted(sides, reverse=turn % 2 == 1):
                rates[name].append(sides[name](whisper, *how))
                print(*how, name, *(f"{one:.2f}" for one in rates[name][-1]), file=sys.stderr, flush=True)
    return found


def page(result: dict[str, Any], command: str) -> str:
    """The tables."""
    machine, counts, before = result["machine"], result["counts"], result["before"]
    known = {"now": counts} | ({"before": before} if before else {})
    lines = ["# What a training step costs before any clock", "", "```", command, "```", ""]
    lines += [
        f"torch {machine['torch']}, transformers {machine['transformers']}, on a CPU in bf16; width {WIDTH}.",
        "Kernels: in forward and backward, of one more block. Kept: for the backward pass, of one more block and 100 s",
        "of audio. The script says how they are counted.",
        "",
    ]
    heading = ["family", "method"]
    for when in known:
        heading += [f"kernels{'' if when == 'now' else f' {when}'}", f"kept, MB{'' if when == 'now' else f' {when}'}"]
    heading += ["kernels, of full", "kept, of full", *(["kernels, of before", "kept, of before"] if before else [])]
    lines += [_row(heading), "|---" * len(heading) + "|"]
    for family in FAMILIES:
        full = counts[family]["full"]
        for method in METHODS:
            own = counts[family][method]
            cells = [family, method]
            for source in known.values():
                cells += [f"{source[family][method]['kernels']:.0f}", f"{source[family][method]['kept_mb']:.1f}"]
            cells += [f"{own[figure] / full[figure]:.2f}" for figure in ("kernels", "kept_mb")]
            if before:
                cells += [_ratio(own[figure], before[family][method][figure]) for figure in ("kernels", "kept_mb")]
            lines.append(_row(cells))
    if result["rates"]:
        lines += ["", *_rates(result)]
    return "\n".join(lines) + "\n"


def main(given: list[str]) -> None:
    """Write both files, or answer for another checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--whisper", help="an encoder's directory, or random; needs --against")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.whisper and not arguments.against:
        parser.error("--whisper needs --against")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the script is run beside others
    if arguments.answer:
        for line in sys.stdin:
            print("answer", json.dumps(answer(json.loads(line))), flush=True)
        return
    other = Checkout(arguments.against.resolve()) if arguments.against else None
    machine = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine |= {"cores": str(os.cpu_count()), "processor": platform.processor() or platform.machine()}
    options = [f"--against {arguments.against.name}"] if other else []
    options += ["--whisper WHISPER"] if arguments.whisper else []
    command = " ".join(["python tests/benchmarks/steps.py", *options])
    result: dict[str, Any] = {"machine": machine, "counts": every_count(lambda *request: answer(list(request)))}
    result |= {"before": every_count(other) if other else None, "rates": None}
    _write(result, arguments.out, command)
    if arguments.whisper and other:
        with tempfile.TemporaryDirectory() as scratch:
            result["rates"] = by_turns(_whisper(arguments.whisper, Path(scratch)), other)
        result["load"] = os.getloadavg()[2]
        _write(result, arguments.out, command)
    if other:
        other.close()


# -- below: how it is done


def _described(backbone: Path, method: str, **changes: Any) -> Experiment:
    """As gpu.py has it, in batches of 20 s."""
    experiment: Experiment = gpu_cells.described({"method": method, "seconds": 20}, backbone)
    return experiment.model_copy(update=changes)


def _write(result: dict[str, Any], out: Path, command: str) -> None:
    write_json(out / "steps.json", result)
    write_text(out / "steps.md", page(result, command))


def _whisper(name: str, scratch: Path) -> Path:
    """The directory of an encoder; for ``random`` one in the shape of whisper-tiny.en."""
    if name != "random":
        return Path(name).resolve()
    return gpu_cells.write_backbone("whisper", (4, 384, 6, 80), scratch)


def _rates(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    lines = [
        "Utterances per second of whisper-tiny.en's encoder in training, steps of 20 s, one thread, "
        f"{machine['processor']}: medians of {TURNS} turns.",
        "Of a core: per second that the process had one, which counts on a busy machine "
        f"(load average over a quarter of an hour: {result['load']:.1f}, on {machine['cores']} cores).",
        "Ratios: the median over turns, the least and the largest.",
        "",
        _row(["method", "now", "before", "ratio", "now, of a core", "before, of a core", "ratio of a core"]),
        "|---" * 7 + "|",
    ]
    for method, rates in result["rates"].items():
        cells = [method]
        for which in (0, 1):
            now, before = ([one[which] for one in rates[name]] for name in ("now", "before"))
            ratios = [ours / theirs for ours, theirs in zip(now, before, strict=True)]
            cells += [f"{statistics.median(side):.2f}" for side in (now, before)]
            cells.append(f"**{statistics.median(ratios):.2f}** [{min(ratios):.2f}, {max(ratios):.2f}]")
        lines.append(_row(cells))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(ours: float, before: float) -> str:
    return f"{ours / before:.2f}" if before else ""


if __name__ == "__main__":
    main(sys.argv[1:])
