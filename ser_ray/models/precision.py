"""Precision, in one place: what is computed in fewer bits, what never is, and how much of a GPU a process may take.

Forward passes run under `autocast`: matrix products and convolutions in bf16 or fp16, as ``precision`` says. What adds
up many numbers or takes small differences of large ones is marked with `in_fp32`, and is computed in fp32 under
autocast too, on every device: log-mel, the norms over time, pooling, moments, the head. The loss and the metrics are
computed outside of autocast. Importing this module keeps TF32 off: fp32 is fp32 on a GPU as on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import torch

WEIGHTS: Final = torch.float32
"""The dtype in which weights are held, trained and frozen alike. Trained ones need it: a step of AdamW is often smaller
than what bf16 can tell apart. Frozen ones could be held in `compute_dtype`, which would halve them and save autocast
its copies; as long as that is not measured on a GPU, one dtype for both is simpler."""
CONTEXT_BYTES: Final = 600 * 2**20
"""An estimate of what a process takes of a GPU beside its tensors: the CUDA context, loaded kernels, cuBLAS."""

P = ParamSpec("P")
R = TypeVar("R")

# TF32 rounds the inputs of fp32 products to 11 bits. Torch allows it for convolutions unless told otherwise. Who wants
# speed takes bf16, which is what `auto` means on a GPU; what is left in fp32 there is left so to be exact.
torch.backends.cudnn.allow_tf32 = False
torch.set_float32_matmul_precision("highest")


def compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """What the setting ``precision`` (fp32, bf16, fp16 or auto) means on a device."""
    if precision == "auto":
        return _best_dtype() if torch.device(device).type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def nf4_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """What 4-bit weights are unpacked to for a product: fp32 on a CPU, where bf16 is no faster, and was 19 times slower
    with some versions of torch."""
    return compute_dtype(precision, device) if torch.device(device).type == "cuda" else torch.float32


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The context in which forward passes run; it does nothing for fp32."""
    dtype = compute_dtype(precision, device)
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not torch.float32)


def in_fp32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function runs in fp32 whatever `autocast` surrounds it.

    Floating-point tensors among its arguments arrive in fp32; those in a list it converts itself, one at a time.

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
    """The fraction of a GPU's memory that the tensors of one process may take, where ``share`` of the GPU is its own.

    As many processes as fit have a context each, which comes off before the rest is divided.

    >>> round(memory_fraction(0.25, 80 * 2**30), 3), memory_fraction(1.0, 80 * 2**30)
    (0.243, 1.0)
    """
    if share >= 1:
        return 1.0
    contexts = int(1 / share + 1e-6) * CONTEXT_BYTES
    return max(0.0, (total_bytes - contexts) / total_bytes * share)


def bound_memory(share: float) -> None:
    """Hold this process to ``share`` of its GPU: a trial that needs more fails by itself, not its neighbours.

    Nothing to do for a whole GPU or none, nor where a GPU was declared to Ray that is not there.
    """
    if 0 < share < 1 and torch.cuda.is_available():
        _, total_bytes = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total_bytes))


# -- below: how it is done


def _best_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _fp32(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
