"""Whether an error means out of memory: each library below a model has its own messages for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from ser_ray.schema import MemoryShortageError

# Messages of torch 2.14, cuDNN and bitsandbytes 0.50; those for a GPU have not been triggered on one.
_SAID: Final = re.compile(
    r"CUDA out of memory"  # a RuntimeError if it comes from another process or a compiled graph
    r"|HIP out of memory|MPS backend out of memory"
    r"|CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"  # bitsandbytes as well
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_(STATUS_)?(INTERNAL_ERROR_DEVICE_)?ALLOC(ATION)?_FAILED"
    # cuBLAS says this if no memory is left for its handle and workspace.
    r"|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|Error out of memory at line"  # bitsandbytes' kernels
    r"|can't allocate memory: you tried to allocate|not enough memory: you tried to allocate",  # on a CPU
)


LEAST_SECONDS: Final = 4.0
"""Smallest batch that is tried, in padded seconds: about one utterance."""

T = TypeVar("T")


def with_what_fits(run: Callable[[float], T], batch_seconds: float) -> T:
    """Return ``run(batch_seconds)``; while memory runs out, try again with half of ``batch_seconds``.

    Raises MemoryShortageError if not even `LEAST_SECONDS` fit.
    """
    while True:
        try:
            return run(batch_seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_seconds <= LEAST_SECONDS:
                raise MemoryShortageError(
                    "out of memory with one utterance per batch; raise resources.gpus_per_worker, or use a smaller "
                    "backbone"
                ) from error
        batch_seconds /= 2  # outside of the handler: its error keeps tensors alive
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or a cause of it, is a failed allocation: of CUDA, cuBLAS, cuDNN, bitsandbytes or the CPU.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    False
    """
    cause: BaseException | None = error
    while cause is not None:
        # By name: torch.OutOfMemoryError.
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or _SAID.search(str(cause)):
            return True
        cause = cause.__cause__
    return False
