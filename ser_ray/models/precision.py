"""The device of a process, how much of a GPU's memory it may take, and precision: what is computed in fewer bits, and
what never is.

Forward passes run under `autocast`: matrix products and convolutions in bf16 or fp16, as ``precision`` says. Functions
that sum many numbers or take small differences of large ones are marked with `in_fp32` and run in fp32 even under
autocast, on every device: log-mel, the norms over time, pooling, moments, the head. The loss and the metrics are
computed outside of autocast. Importing this module turns TF32 off: fp32 on a GPU is the same as on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import torch
from torch import nn

WEIGHTS: Final = torch.float32
"""The dtype that weights are read in, and trainable ones stay in: a step of AdamW is often smaller than the resolution
of bf16. See `hold_frozen` for the others."""
CONTEXT_BYTES: Final = 600 * 2**20
"""Estimated GPU memory of a process besides its tensors: the CUDA context, loaded kernels, cuBLAS."""

P = ParamSpec("P")
R = TypeVar("R")

# TF32 rounds the inputs of fp32 products to 11 bits. Torch allows it for convolutions by default. For speed there is
# bf16, which is what `auto` means on a GPU; what runs in fp32 there is meant to be exact.
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("highest")


def choose_device(gpus: float | None = None) -> torch.device:
    """The device that a process computes on: the GPU where it has one, else the CPU.

    ``gpus``: how many GPUs it asked Ray for. With 0 it is the CPU: Ray hides no GPU from a process that asked for none.
    With more it can be the CPU too: GPUs declared to Ray may not exist. None: any GPU that the process sees.
    """
    return torch.device("cuda" if gpus != 0 and torch.cuda.is_available() else "cpu")


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype that the setting ``precision`` (fp32, bf16, fp16 or auto) means on a device."""
    if precision == "auto":
        return _best_dtype() if torch.device(device).type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def parameters_in(tensor: torch.Tensor) -> int:
    """The number of weights that a tensor stands for: in NF4, one byte holds two."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else int(math.prod(state.shape))


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The context in which forward passes run; it does nothing for fp32."""
    dtype = compute_dtype(precision, device)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not torch.float32)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that a matrix product with this tensor has here: that of `autocast` within it, else the tensor's."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what `autocast` would convert at every use, to the same bits: frozen weights of linear layers and
    convolutions. That halves their memory, and saves the conversions. Norms, positions and 4-bit layers stay as they
    are, and so does what is trainable.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module.weight.is_floating_point():
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def no_autocast(device: torch.device) -> torch.autocast:
    """The context in which nothing is converted unasked, within `autocast` too."""
    return torch.autocast(device.type, enabled=False)


def in_fp32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function runs in fp32 whatever `autocast` surrounds it.

    Floating-point tensors among its arguments are converted to fp32. Tensors in a list are not: the function converts
    them itself, one at a time.

    >>> double = in_fp32(lambda x: x @ x)
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     print(double(torch.eye(2, dtype=torch.bfloat16)).dtype)
    torch.float32
    """

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            converted = {name: _fp32(value) for name, value in kwargs.items()}
            return function(*map(_fp32, args), **converted)  # type: ignore[arg-type]

    return exact


def memory_fraction(share: float, total_bytes: int) -> float:
    """The fraction of a GPU's memory that the tensors of a process with ``share`` of the GPU may take.

    Every process that fits on the GPU has a context; these are subtracted before the rest is divided.

    >>> round(memory_fraction(0.25, 80 * 2**30), 3), memory_fraction(1.0, 80 * 2**30)
    (0.243, 1.0)
    """
    if share >= 1:
        return 1.0
    contexts = int(1 / share + 1e-6) * CONTEXT_BYTES
    return max(0.0, (total_bytes - contexts) / total_bytes * share)


def bound_memory(share: float) -> None:
    """Limit this process to ``share`` of its GPU's memory: a trial that needs more fails alone, not its neighbours.

    Does nothing for a whole GPU or none, nor if a GPU was declared to Ray that does not exist.
    """
    if 0 < share < 1 and torch.cuda.is_available():
        _, total_bytes = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total_bytes))


# -- below: how it is done


def _best_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _fp32(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
