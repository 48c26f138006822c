"""Whether an error means that memory did not suffice: the libraries under a model each say it in their own way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from ser_ray.schema import MemoryShortageError

# The words of torch 2.14, cuDNN and bitsandbytes 0.50; those of a GPU have not been provoked on one.
_SAID: Final = re.compile(
    r"CUDA out of memory"  # a RuntimeError where it crossed a process or a compiled graph
    r"|HIP out of memory|MPS backend out of memory"
    r"|CUDA (driver )?error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"  # bitsandbytes as well
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_(STATUS_)?(INTERNAL_ERROR_DEVICE_)?ALLOC(ATION)?_FAILED"
    # Where nothing is left for its handle and workspace, cuBLAS says this.
    r"|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|Error out of memory at line"  # bitsandbytes' kernels
    r"|can't allocate memory: you tried to allocate|not enough memory: you tried to allocate",  # on a CPU
)


LEAST_SECONDS: Final = 4.0
"""Of a batch: about one utterance. Less than that is not tried."""

T = TypeVar("T")


def with_what_fits(run: Callable[[float], T], batch_seconds: float) -> T:
    """What ``run`` gives for batches of so many padded seconds; of half as many, and again, where memory is short.

    Raises MemoryShortageError where not even `LEAST_SECONDS` fit.
    """
    while True:
        try:
            return run(batch_seconds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch_seconds <= LEAST_SECONDS:
                raise MemoryShortageError(
                    "out of memory with an utterance at a time; raise resources.gpus_per_worker, or take a smaller "
                    "backbone"
                ) from error
        batch_seconds /= 2  # not in the handler: its error holds on to what was allocated
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what caused it, is a failed allocation: of CUDA, cuBLAS, cuDNN, bitsandbytes or the CPU.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    False
    """
    cause: BaseException | None = error
    while cause is not None:
        # By its name, so that who only asks need not load torch; as a class it is torch.OutOfMemoryError.
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or _SAID.search(str(cause)):
            return True
        cause = cause.__cause__
    return False
