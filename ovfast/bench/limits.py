"""The most that a machine was seen to do: reading memory and multiplying matrices, best of a few.

Denominators of every floor. On a CPU torch's products and ours are both tried, so that neither
side can be faster than its limit for long; without the native back end reading is torch's sum.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ovfast.ops import Ops, PackedLinear, make_ops, multiplies_bfloat16
from ovfast.storage import BFLOAT16_MATMUL

__all__ = ["Limits", "best_of", "best_seconds", "measure_limits", "seconds"]

READ_BYTES = 256 << 20  # more than the caches of most CPUs
ROWS, INNER, OUTER = 256, 1152, 4304  # a third of the tower's widest product: 20 ms
PRODUCT_FLOPS = 2 * ROWS * INNER * OUTER
REPEATS, READS = 25, 5  # short and many, to meet quiet moments of a busy machine
CUDA_COPY_BYTES = 1 << 30
CUDA_SIDE = 8192
CUDA_LAUNCHES = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """Best rates of one device.

    Attributes:
        read_gb_per_s: by number of threads; on CUDA under "copy", reads and writes together.
        float32_gflops, int8_gops: of products on a CPU; int8 None where no kernel multiplies it.
        bfloat16_gflops: of products on CUDA, or on a CPU that has them.
        launch_us: of a kernel that does nothing, on CUDA.
    """

    read_gb_per_s: dict[str, float]
    float32_gflops: float | None = None
    int8_gops: float | None = None
    bfloat16_gflops: float | None = None
    launch_us: float | None = None


def best_of(first: Limits, second: Limits) -> Limits:
    """The better rate of two measurements of one device, one by one."""

    def most(name: str) -> float | None:
        found = [getattr(one, name) for one in (first, second) if getattr(one, name) is not None]
        return max(found) if found else None

    launches = [one.launch_us for one in (first, second) if one.launch_us is not None]
    return Limits(
        read_gb_per_s=_most_each(first.read_gb_per_s, second.read_gb_per_s),
        float32_gflops=most("float32_gflops"),
        int8_gops=most("int8_gops"),
        bfloat16_gflops=most("bfloat16_gflops"),
        launch_us=min(launches) if launches else None,
    )


def _most_each(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {key: max(value, second[key]) for key, value in first.items()}


def measure_limits(device: torch.device, threads: int) -> Limits:
    """Takes about two seconds.

    Args:
        device: to measure.
        threads: of a CPU.
    """
    if device.type == "cuda":
        return _cuda_limits(device)
    with torch_threads(threads):
        return _cpu_limits(threads)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of some runs after one that does not count, the device's work included."""
    times = []
    for repeat in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if repeat:
            times.append(time.perf_counter() - start)
    return times


def best_seconds(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """The shortest of some runs."""
    return min(seconds(work, device, repeats))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_limits(threads: int) -> Limits:
    cpu = torch.device("cpu")
    x, weight = torch.randn(ROWS, INNER), torch.randn(OUTER, INNER)
    times = [best_seconds(lambda: x @ weight.t(), cpu)]
    int8_times, bfloat16_times = [], []
    ops = make_ops(cpu, "auto", threads=threads)
    if ops.native is not None:
        times.append(_product_seconds("float32", threads, x, weight))
        int8_times = [_product_seconds(kind, threads, x, weight) for kind in ("int8", "int4")]
        if multiplies_bfloat16():
            bfloat16_times = [_product_seconds(BFLOAT16_MATMUL, threads, x, weight)]
    return Limits(
        read_gb_per_s={str(count): _read_rate(ops, count) for count in sorted({1, threads})},
        float32_gflops=PRODUCT_FLOPS / min(times) / 1e9,
        int8_gops=PRODUCT_FLOPS / min(int8_times) / 1e9 if int8_times else None,
        bfloat16_gflops=PRODUCT_FLOPS / min(bfloat16_times) / 1e9 if bfloat16_times else None,
    )


def _product_seconds(storage: str, threads: int, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Of the native back end's product with weights in a storage."""
    ops = make_ops(torch.device("cpu"), "native", threads=threads, storage=storage)
    packed: PackedLinear = ops.pack_linear(weight, None)
    return best_seconds(lambda: ops.linear(x, packed), x.device)


def _read_rate(ops: Ops, threads: int) -> float:
    """10⁹ bytes per second."""
    if ops.native is not None:
        pool = ops.native.ThreadPool(threads)
        return max(float(ops.native.read_bandwidth(pool, READ_BYTES)) for _ in range(READS)) / 1e9
    data = torch.ones(READ_BYTES // 4)
    with torch_threads(threads):
        return data.nbytes / best_seconds(data.sum, data.device) / 1e9


def _cuda_limits(device: torch.device) -> Limits:
    data = torch.empty(CUDA_COPY_BYTES, dtype=torch.uint8, device=device)
    out = torch.empty_like(data)
    copy = best_seconds(lambda: out.copy_(data), device)
    a, b = (torch.randn(CUDA_SIDE, CUDA_SIDE, device=device).bfloat16() for _ in range(2))
    product = best_seconds(lambda: a @ b, device)
    tiny = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(CUDA_LAUNCHES):
            tiny.zero_()

    return Limits(
        read_gb_per_s={"copy": 2 * data.nbytes / copy / 1e9},
        bfloat16_gflops=2 * CUDA_SIDE**3 / product / 1e9,
        launch_us=1e6 * best_seconds(launches, device) / CUDA_LAUNCHES,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
