"""WavLM's attention here beside that of transformers: seconds, operations, and bytes kept for the backward pass.

    python tests/benchmarks/wavlm.py [--shapes base] [--batches "2 of 4 s"] [--rounds 5] > results/benchmarks/wavlm.md

Blocks of random weights in the shapes of wavlm-base-plus and wavlm-large, fp32, with the published dropout, on one
thread of a CPU; both sides have the same weights and get the same input. Seconds are those of the process on its core
(`time.process_time`) for two blocks, forward and backward (frozen: forward alone), both sides in turn, the median of
the rounds; the ratio is the median of the ratios of a round. Operations are those that torch dispatches, without views
and allocations; they and the bytes are the difference between three blocks and two, so what a batch needs once (the
position bias) is not in them. Adapters are PEFT's on both sides, rank 8. LoRA in all layers has no other side: an
adapter in transformers' attention is bypassed.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Final

import torch
import transformers
from dispatched import Kernels

from ser_ray.config import Adapter
from ser_ray.models import backbones
from ser_ray.models.adapters import ATTENTION, FEED_FORWARD, adapt
from ser_ray.models.backbones import frame_mask

SHAPES: Final = {"base": (768, 12, False), "large": (1024, 16, True)}
"""Width, heads, whether blocks normalise their input."""
BATCHES: Final = {"2 of 4 s": (199, 170), "1 of 10 s": (499,)}
"""Frames of each utterance."""
WAYS: Final = {
    "frozen": Adapter(method="frozen"),
    "LoRA in feed-forward": Adapter(targets=FEED_FORWARD["wavlm"], dropout=0.05),
    "LoRA in all layers": Adapter(targets=ATTENTION["wavlm"] + FEED_FORWARD["wavlm"], dropout=0.05),
    "full": Adapter(method="full"),
}
ONLY_HERE: Final = "LoRA in all layers"
Run = Callable[[], torch.Tensor]


def sides(shape: str, way: str, frames: tuple[int, ...], blocks: int) -> dict[str, tuple[torch.nn.Module, Run]]:
    """Both encoders and their forward pass over one random batch."""
    width, heads, stable = SHAPES[shape]
    described = transformers.WavLMConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=blocks, intermediate_size=4 * width,
        do_stable_layer_norm=stable, feat_extract_norm="layer" if stable else "group", conv_dim=[16] * 7,
    )  # fmt: skip
    theirs = transformers.WavLMModel(described)
    ours = backbones._wrapped(copy.deepcopy(theirs), described, transformers.Wav2Vec2FeatureExtractor())
    hidden_BFD = torch.randn(len(frames), max(frames), width)
    mask_BF = frame_mask(torch.tensor(frames), max(frames))

    def of_transformers() -> torch.Tensor:
        state_BFD, bias = hidden_BFD, None
        for layer in theirs.encoder.layers:
            state_BFD, bias = layer(state_BFD, attention_mask=mask_BF, position_bias=bias)
        return theirs.encoder.layer_norm(state_BFD) if stable else state_BFD

    adapt(ours, WAYS[way])
    _adapt_theirs(theirs, WAYS[way])
    both = {"transformers": (theirs, of_transformers), "here": (ours, lambda: ours.blocks(hidden_BFD, mask_BF)[-1])}
    with torch.no_grad():
        own, other = (both[side][1]()[mask_BF] for side in ("here", "transformers") if both[side][0].eval())
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    for model, _ in both.values():
        model.train()
    return both


def _adapt_theirs(model: transformers.WavLMModel, adapter: Adapter) -> None:
    if adapter.method == "frozen":
        model.requires_grad_(False)
    elif adapter.method == "lora":
        from peft import LoraConfig, get_peft_model

        get_peft_model(
            model,
            LoraConfig(
                r=adapter.rank,
                lora_alpha=adapter.alpha,
                lora_dropout=adapter.dropout,
                target_modules=list(adapter.targets or ()),
            ),
        )


def step(run: Run, way: str) -> None:
    """Forward, and backward where something is trained."""
    if way == "frozen":
        with torch.inference_mode():
            run()
    else:
        run().square().mean().backward()


def seconds(both: dict[str, tuple[torch.nn.Module, Run]], way: str, rounds: int) -> dict[str, list[float]]:
    """Of each side, one a round."""
    taken: dict[str, list[float]] = {side: [] for side in both}
    for number in range(rounds + 1):
        for side, (model, run) in both.items():
            model.zero_grad()
            started = time.process_time()
            step(run, way)
            if number:  # the first warms up
                taken[side].append(time.process_time() - started)
    return taken


def operations_and_bytes(model: torch.nn.Module, run: Run, way: str) -> tuple[int, int]:
    """Operations of a step, and the bytes of all that it keeps for its backward pass, without weights."""
    model.zero_grad()
    with Kernels() as kernels:
        step(run, way)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.set_grad_enabled(way != "frozen"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return kernels.names.total(), sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


def row(shape: str, batch: str, way: str, rounds: int) -> str:
    """Of the table."""
    both = sides(shape, way, BATCHES[batch], 2)
    taken = seconds(both, way, rounds)
    more = sides(shape, way, BATCHES[batch], 3)
    cells = {}
    for side in both:
        two, three = (operations_and_bytes(*which[side], way) for which in (both, more))
        cells[side] = (statistics.median(taken[side]), three[0] - two[0], (three[1] - two[1]) / 2**20)
    (s, n, m), (our_s, our_n, our_m) = cells["transformers"], cells["here"]
    ratios = [a / b for a, b in zip(taken["transformers"], taken["here"], strict=True)]
    if way == ONLY_HERE:
        return f"| {shape} | {batch} | {way} | - | {our_s:.3f} | - | - | {our_n} | - | {our_m:.0f} |"
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {shape} | {batch} | {way} | {s:.3f} | {our_s:.3f} | {ratio} | {n} | {our_n} | {m:.0f} | {our_m:.0f} |"


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    about = (__doc__ or "").split("\n\n")
    command = shlex.join(["python", "tests/benchmarks/wavlm.py", *sys.argv[1:]])
    print(f"# WavLM's attention\n\n{about[0]}\n\n```\n{command} > results/benchmarks/wavlm.md\n```\n")
    print(f"{about[2].strip()}\n")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {asked.rounds} rounds.\n")
    print("| | | | s a step | | | operations a block | | MB kept a block | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(
        "| shape | batch | trained | transformers | here | ratio (lowest to highest) "
        + "| transformers | here " * 2
        + "|"
    )
    for shape in asked.shapes:
        for batch in asked.batches:
            for way in WAYS:
                print(row(shape, batch, way, asked.rounds), flush=True)
                print(f"{shape}, {batch}, {way}", file=sys.stderr)


if __name__ == "__main__":
    main()
