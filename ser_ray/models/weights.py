"""A stranger's files, read with care: safetensors that are all that a model needs, every number finite, and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from ser_ray.disk import read_json
from ser_ray.schema import UserError, reason_of

MOST_BYTES: Final = 10_000_000
"""Of a JSON file: the index of the largest models has some megabytes, a configuration some thousand bytes."""
REASON: Final = 160
"""Characters of what a library says of a stranger's file: some quote it whole."""


def read_weights(path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ``path``, on the device and in the dtype of those in ``wanted``, which say what has to be there.

    Raises UserError, in one line, for a file that is missing, cut short or not safetensors, and where a tensor is
    missing, is of no use to the model, has another shape, or holds NaN or infinity. A model without some of its weights
    would predict all the same, and wrongly.
    """
    found = read_tensors(path)
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path}: {len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}")
    if foreign := sorted(found.keys() - wanted.keys()):
        raise UserError(f"{path}: {foreign[0][:120]} is no weight of the model that experiment.yaml describes")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            raise UserError(f"{path}: {name} has the shape {shapes}: it does not fit experiment.yaml")
    found = {name: tensor.to(wanted[name]) for name, tensor in found.items()}
    if damaged := not_finite(found.items()):
        raise UserError(f"{path}: {damaged} has values that are not finite: its weights are damaged")
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises UserError, in one line, where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: this file is missing; give a complete checkpoint")
    try:
        return load_file(path)
    except OSError:
        raise  # of the disk
    except Exception as error:  # of a damaged file safetensors and torch raise errors of several kinds
        raise UserError(f"{path}: not readable as safetensors: {reason_of(error, REASON)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, in one line, where there is none."""
    if not path.is_file():
        raise UserError(f"{path}: this file is missing; give a complete checkpoint")
    check_small(path)
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {reason_of(error, REASON)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not readable as JSON: it is no object")
    return content


def check_small(path: Path) -> None:
    """Raises UserError for a JSON file of a model that is too large to be one: reading it takes many times its size."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UserError(f"{path}: {size:,} bytes are too many for such a file, which has {MOST_BYTES:,} at most")


def not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none."""
    for name, tensor in named:
        # The limits are NaN where any value is: one pass without a copy, which matters for the weights of a backbone.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None
