"""How a backbone is adapted: which weights are trainable, LoRA through PEFT, and the check that all get gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from ser_ray import config
from ser_ray.models import pretrained, variants
from ser_ray.models.backbones import Backbone
from ser_ray.models.lowrank import Updates
from ser_ray.models.precision import hold_frozen
from ser_ray.models.weights import read_object, read_weights
from ser_ray.schema import UserError

# PEFT takes seconds to import, which a trial that trains only the head or all weights need not wait for.
if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ATTENTION: Final = {
    "wav2vec2": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "hubert": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "whisper": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
FEED_FORWARD: Final = {
    "wav2vec2": ("intermediate_dense", "output_dense"),
    "hubert": ("intermediate_dense", "output_dense"),
    "wavlm": ("intermediate_dense", "output_dense"),
    "whisper": ("fc1", "fc2"),
}


def adapt(backbone: Backbone, adapter: config.Adapter, saved: bool = False) -> PeftModel | None:
    """Set which of the backbone's weights are trainable; for lora and qlora, insert low-rank updates.

    Returns PEFT's view of the backbone; None for frozen and full. ``saved``: `load_updates` will load saved updates
    into it, so that those of pissa and loftq need no initial ones.
    Raises UserError where `adapter.targets`, `adapter.first_layer` or for pissa and loftq `adapter.rank` do not fit
    this backbone.
    """
    if adapter.method != "frozen" and adapter.first_layer >= backbone.num_layers:
        raise UserError(
            f"adapter.first_layer is {adapter.first_layer}, but this {backbone.family} backbone has layers "
            f"0 to {backbone.num_layers - 1}; for no adaptation set adapter.method to frozen"
        )
    backbone.first_trained = None if adapter.method == "frozen" else adapter.first_layer
    if adapter.method == "full":
        _unfreeze_from(backbone, adapter.first_layer)
        return None
    backbone.model.requires_grad_(False)
    if adapter.method == "frozen":
        hold_frozen(backbone.model, backbone.compute_dtype)
        return None
    from peft import get_peft_model

    peft = get_peft_model(backbone.model, _lora_config(backbone, adapter))
    hold_frozen(backbone.model, backbone.compute_dtype)  # later than PEFT, which would round new updates as well
    backbone.updates = Updates(backbone.layers())
    variants.start(peft, adapter.variant, saved)  # last: what it changes in the weights, loading changes to the bit
    return peft


def targets_of_0_1(directory: Path, adapter: config.Adapter, backbone: str) -> bool:
    """Whether a saved adapter has the default targets that WavLM had in version 0.1: feed-forward alone.

    Its attention was transformers' own then, which bypasses adapters and cannot be held in 4 bits.
    """
    saved = read_object(directory / "adapter_config.json").get("target_modules")
    if adapter.targets is not None or not isinstance(saved, list):
        return False
    alone = not any(str(target).endswith(ATTENTION["wavlm"]) for target in saved)
    return alone and pretrained.describe(backbone)[0].model_type == "wavlm"


def attach(backbone: Backbone, directory: Path, adapter: config.Adapter) -> PeftModel:
    """Insert saved low-rank updates (PEFT layout, safetensors) into a newly loaded backbone.

    PEFT gets its configuration from ``adapter``, that is from experiment.yaml: the saved adapter_config.json may be a
    stranger's, and only has to agree with it. Raises UserError where it does not, and where `read_weights` does.
    """
    path = directory / "adapter_config.json"
    _check_saved(path, backbone, _lora_config(backbone, variants.as_saved(adapter)).to_dict())
    peft = adapt(backbone, adapter, saved=True)
    assert peft is not None, adapter.method
    load_updates(peft, directory)
    return peft


def save_updates(peft: PeftModel, directory: Path) -> None:
    """Write the low-rank updates of a model in PEFT's layout, as they fit the backbone that was loaded."""
    state = variants.saved_state(peft)
    peft.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False, state_dict=state)


def load_updates(peft: PeftModel, directory: Path) -> None:
    """Load saved low-rank updates into those of a model; raises UserError where `read_weights` does."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = variants.saved_state(peft)
    wanted: dict[str, torch.Tensor] = get_peft_model_state_dict(peft, state_dict=state, save_embedding_layers=False)
    weights = read_weights(directory / "adapter_model.safetensors", wanted)
    set_peft_model_state_dict(peft, variants.unpacked(peft, weights))


def check_gradients(model: nn.Module) -> None:
    """Check after the first backward pass that every trainable weight has a gradient.

    A gradient of zero is accepted: LoRA's A has one at first, since B starts at zero, and so have the blocks above the
    one that a probe reads. No gradient at all means that the forward pass does not use the weight.
    Raises UserError naming the first module that is bypassed.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            module = name.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias")
            if name.startswith("head."):
                raise UserError(f"{module} got no gradient in the first step: the head or its pooling does not use it")
            raise UserError(
                f"adapter: {module} got no gradient in the first step: the backbone bypasses it and it would never be "
                "trained; remove it from adapter.targets"
            )


def _unfreeze_from(backbone: Backbone, first_layer: int) -> None:
    """Train all weights, or with ``first_layer`` above 0 only those of the blocks from there on."""
    if first_layer == 0:
        return
    backbone.model.requires_grad_(False)
    for layer in backbone.layers()[first_layer:]:
        layer.requires_grad_(True)


def _lora_config(backbone: Backbone, adapter: config.Adapter) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0 if adapter.variant == "pissa" else adapter.dropout,
        use_rslora=adapter.variant == "rslora",
        use_dora=adapter.variant == "dora",
        target_modules=_target_modules(backbone, adapter),
    )


_NEEDED: Final = ("peft_type", "r", "lora_alpha", "target_modules")
_FREE: Final = ("inference_mode", "peft_version")
"""Keys of adapter_config.json that every file has, and those whose values mean nothing here."""


def _check_saved(path: Path, backbone: Backbone, expected: Mapping[str, Any]) -> None:
    """Raises UserError where adapter_config.json describes another adapter than experiment.yaml, or names other files
    or code."""
    saved = read_object(path)
    expected = {**expected, "base_model_name_or_path": backbone.model.name_or_path}
    linear = [name for name, module in backbone.model.named_modules() if isinstance(module, nn.Linear)]
    for key in (*_NEEDED, *saved):
        value, ours = saved.get(key), expected.get(key)
        if key == "target_modules":
            agree = isinstance(value, list) and _named(value, linear) == _named(ours, linear)
            ours = "other modules"
        elif key == "auto_mapping":  # names a module of the backbone's class, for programs that load it by this alone
            agree = value is None or str(value.get("parent_library")).startswith("transformers.")
        elif key == "base_model_name_or_path":
            agree = value in (None, ours)
        elif key in expected:
            agree = value == ours
        else:  # of a later version of PEFT
            agree = not isinstance(value, str | list | dict) or not value
        if not agree and key not in _FREE:
            raise UserError(
                f"{path}: {key} is {str(value)[:80]}, but experiment.yaml describes {str(ours)[:80]}; take both as "
                "they were saved (a backbone that has moved is given by --backbone DIR)"
            )


def _named(targets: object, linear: list[str]) -> set[str]:
    """The linear layers that PEFT adapts for a list of names: those that are one, or end with one."""
    names = {target for target in targets if isinstance(target, str)} if isinstance(targets, list | set) else set()
    return {name for name in linear if any(name == one or name.endswith(f".{one}") for one in names)}


def _target_modules(backbone: Backbone, adapter: config.Adapter) -> list[str]:
    """Full names of the linear layers to adapt, in blocks from ``first_layer`` on."""
    wanted = adapter.targets or ATTENTION[backbone.family] + FEED_FORWARD[backbone.family]
    layers = {id(layer): index for index, layer in enumerate(backbone.layers())}
    names: list[str] = []
    for layer_name, layer in backbone.model.named_modules():
        if layers.get(id(layer), -1) >= adapter.first_layer:
            names += [
                f"{layer_name}.{name}"
                for name, module in layer.named_modules()
                if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in wanted
            ]
    matched = {name.rsplit(".", 1)[-1] for name in names}
    if missing := [target for target in wanted if target not in matched]:
        known = sorted(
            {n.rsplit(".", 1)[-1] for n, m in backbone.layers()[0].named_modules() if isinstance(m, nn.Linear)}
        )
        raise UserError(
            f"adapter.targets: {missing[0]!r} is not a linear layer of this {backbone.family} backbone; "
            f"known: {', '.join(known)}"
        )
    return names
