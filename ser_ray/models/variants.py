"""Variants of LoRA that start from the backbone's weights, PiSSA and LoftQ: their initial updates, and what is saved.

LoftQ (arXiv 2310.08659, one iteration): B A is the best low-rank approximation of what NF4 has changed in the weights.
PiSSA (arXiv 2404.02948): B A is the best one of the weights themselves, and is taken out of the frozen ones, so that
training changes their largest singular directions. Both are balanced: A and B get the roots of the singular values.

An update of PiSSA would only fit the weights that are left, which nobody else has. So it is saved as its difference to
the initial one, B A - B0 A0, which is an ordinary update of twice the rank: A above A0, and B beside -B0. That fits the
published weights in any program, and loading takes the initial one out again: to the bit what training left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from ser_ray import config
from ser_ray.models import backbones
from ser_ray.models.lowrank import ADAPTER
from ser_ray.schema import UserError

if TYPE_CHECKING:
    from peft import PeftModel

ITERATIONS: Final = 16
"""Of the randomised singular value decomposition: the largest number that the PiSSA paper tries. With twice as many
directions as are needed, the approximation of whisper-base's weights is within 1e-4 of the best one."""


def as_saved(adapter: config.Adapter) -> config.Adapter:
    """What adapter_config.json says of an adapter."""
    doubled = {"rank": 2 * adapter.rank, "alpha": 2 * adapter.alpha}  # alpha / rank stays the same
    return adapter.model_copy(update=doubled) if adapter.variant == "pissa" else adapter


@torch.no_grad()
def start(peft: PeftModel, variant: str, saved: bool = False) -> None:
    """Set the initial updates of pissa and loftq in newly inserted layers; those of other variants are PEFT's: zero.

    With ``saved`` they are left as they are: `unpacked` will set them. Weights are changed in place. The random numbers
    of the decomposition depend on torch's seed, and it has as many left afterwards: the head is that of other variants.
    Raises UserError where a layer has fewer singular directions than the rank.
    """
    published = _published(peft) if variant == "loftq" and not saved else {}
    for name, layer in _layers(peft).items():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        weight = layer.get_base_layer().weight
        if not saved and variant in ("pissa", "loftq"):
            matrix = weight if variant == "pissa" else published[name].to(a.device) - _dequantised(weight)
            for part, initial in zip((a, b), _largest(matrix, len(a), layer.scaling[ADAPTER], name), strict=True):
                part.copy_(initial)
        if variant == "pissa":
            layer.register_buffer("initial_A", a.detach().clone(), persistent=False)
            layer.register_buffer("initial_B", b.detach().clone(), persistent=False)
            if not saved:
                _take_out(layer)
    if variant == "pissa":  # what is saved, and only that: the layers have their own
        peft.peft_config[ADAPTER].r *= 2
        peft.peft_config[ADAPTER].lora_alpha *= 2


def saved_state(peft: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of a model by PEFT's names, with its updates as they fit the published weights."""
    state: dict[str, torch.Tensor] = peft.state_dict()
    for name, layer in _layers(peft, of_pissa=True).items():
        for part, initial, dim in (("lora_A", layer.initial_A, 0), ("lora_B", -layer.initial_B, 1)):
            key = f"{_PREFIX}{name}.{part}.{ADAPTER}.weight"
            state[key] = torch.cat([state[key], initial], dim)
    return state


@torch.no_grad()
def unpacked(peft: PeftModel, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The updates to load of those that were saved. For pissa, the saved initial ones are taken out of the weights,
    which are the published ones until then."""
    updates = dict(saved)
    for name, layer in _layers(peft, of_pissa=True).items():
        key_a, key_b = (f"{_PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        updates[key_a], initial_a = saved[key_a].chunk(2, 0)
        updates[key_b], minus_b = saved[key_b].chunk(2, 1)
        layer.initial_A.copy_(initial_a)
        layer.initial_B.copy_(-minus_b)
        _take_out(layer)
    return updates


@torch.no_grad()
def restore(peft: PeftModel) -> None:
    """Put the published weights back where `start` has taken the initial updates out, to load others."""
    if layers := _layers(peft, of_pissa=True):
        published = _published(peft)
        for name, layer in layers.items():
            layer.get_base_layer().weight.copy_(published[name])


@torch.no_grad()
def copy_dequantised(quantised: nn.Module, encoder: nn.Module) -> None:
    """Set weights of ``encoder``, none of which is in 4 bits, to what those that are in 4 bits in ``quantised`` stand
    for. Both are the same backbone; ``encoder`` may be without low-rank updates."""
    modules = dict(encoder.named_modules())
    for name, module in quantised.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            own: Any = modules[name if name in modules else name.removesuffix(".base_layer")]
            own.weight.copy_(_dequantised(module.weight))


# -- below: how it is done

_PREFIX: Final = "base_model.model."
"""Of the names of layers in PEFT."""


def _layers(peft: PeftModel, of_pissa: bool = False) -> dict[str, Any]:
    """The adapted layers by their names in the backbone."""
    needed = "initial_A" if of_pissa else "lora_A"
    found: Iterator[tuple[str, nn.Module]] = peft.named_modules()
    return {name.removeprefix(_PREFIX): module for name, module in found if hasattr(module, needed)}


def _published(peft: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the adapted layers as they are on disk, not in 4 bits."""
    encoder = backbones.load(peft.get_base_model().name_or_path).model
    return {name: encoder.get_submodule(name).weight for name in _layers(peft)}


def _dequantised(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    dequantised: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dequantised.float()


def _take_out(layer: Any) -> None:
    """Subtract the initial update from the frozen weights of a layer."""
    weight = layer.get_base_layer().weight
    weight.copy_(weight.float() - (layer.scaling[ADAPTER] * layer.initial_B) @ layer.initial_A)


def _largest(matrix: torch.Tensor, rank: int, scaling: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with scaling B A = the best approximation of a matrix (outputs, inputs) that has this rank."""
    if rank > min(matrix.shape):
        raise UserError(
            f"adapter.rank is {rank}, but {name} has only {min(matrix.shape)} singular directions to start from: lower "
            "it, or take another adapter.variant than pissa and loftq"
        )
    with torch.random.fork_rng():
        left_OR, values_R, right_IR = torch.svd_lowrank(matrix.float(), min(2 * rank, *matrix.shape), ITERATIONS)
    root_R = (values_R[:rank] / scaling).sqrt()
    return (right_IR[:, :rank] * root_R).T, left_OR[:, :rank] * root_R
