"""What the libraries say when memory does not suffice, each in its own words; and what is another failure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ser_ray.schema import MemoryShortageError
from ser_ray.training.memory import is_out_of_memory, with_what_fits

SHORT = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB in all"),
    "CUDA, from elsewhere": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "CUDA, asynchronously": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuBLAS, no handle": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "bitsandbytes": RuntimeError("Error out of memory at line 380 in file /src/csrc/ops.cu"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
        " to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": MemoryError("Unable to allocate 9 GiB for an array"),
}
OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("Expected more than 1 value per channel"),
]


@pytest.mark.parametrize("error", SHORT.values(), ids=SHORT)
def test_short_memory_is_recognised(error):
    assert is_out_of_memory(error)
    behind = RuntimeError("a step failed")
    behind.__cause__ = error
    assert is_out_of_memory(behind)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_failures_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_what_the_libraries_raise_themselves_is_recognised():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(of_torch.value)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**60, np.uint8)
    assert is_out_of_memory(of_numpy.value)


def test_what_does_not_fit_is_tried_with_half_until_it_does() -> None:
    asked = []

    def run(seconds: float) -> str:
        asked.append(seconds)
        if seconds > 10:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return "done"

    assert with_what_fits(run, 60.0) == "done"
    assert asked == [60.0, 30.0, 15.0, 7.5]


def test_what_never_fits_is_one_line_and_other_errors_pass() -> None:
    def never(seconds: float) -> None:
        raise RuntimeError("CUDA out of memory")

    def fails(seconds: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(MemoryShortageError, match="one utterance per batch"):
        with_what_fits(never, 60.0)
    with pytest.raises(ZeroDivisionError):
        with_what_fits(fails, 60.0)
