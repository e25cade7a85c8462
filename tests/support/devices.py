"""Where a kernel test runs: parameters for the interpreter on the CPU and for a CUDA device."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.support.interpreter import INTERPRETING

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
requires_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def kernel_params() -> list[object]:
    """(device, dtype) parameters of a kernel test.

    The interpreter has no bfloat16: its tl.dot multiplies raw bits and its stores truncate.
    """
    cpu = [
        pytest.param("cpu", dtype, marks=pytest.mark.interpreter, id=f"cpu-{name}")
        for name, dtype in (("f32", torch.float32), ("f16", torch.float16))
    ]
    cuda = [
        pytest.param("cuda", dtype, marks=[pytest.mark.gpu, requires_cuda], id=f"cuda-{name}")
        for name, dtype in (
            ("f32", torch.float32),
            ("f16", torch.float16),
            ("bf16", torch.bfloat16),
        )
    ]
    return cpu if INTERPRETING else [*cpu, *cuda]


def quick_kernel_params() -> list[object]:
    """As `kernel_params`, one dtype of the interpreter in the quick suite: for whole models."""
    return [
        pytest.param(*param.values, id=param.id, marks=[*param.marks, pytest.mark.slow])
        if param.id == "cpu-f16"
        else param
        for param in kernel_params()
    ]


def quick_first(quick: str, names: Iterable[str]) -> list[object]:
    """Parameters of which one is in the quick suite; a device has time for all."""
    slow = () if torch.cuda.is_available() else (pytest.mark.slow,)
    return [pytest.param(name, marks=() if name == quick else slow) for name in names]


@contextmanager
def host_never_waits() -> Iterator[None]:
    """Raises where the host would wait for a stream; it may wait for events."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says once that it may miss some ways to wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Lets torch reserve no more than so much on the device."""
    before = torch.cuda.get_per_process_memory_fraction()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
