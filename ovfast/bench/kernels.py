"""Every operation on every back end of a device, in turn, each beside what the machine could do.

One process, the same threads for all. Before each call the caches are flushed: in a model other
layers have passed through them, and only what comes from memory can be put beside its bandwidth.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ovfast.bench.accuracy import Variant
from ovfast.bench.bounds import Bounds
from ovfast.bench.op_cases import Bench, OpCase, Work, op_cases
from ovfast.bench.record import Row
from ovfast.bench.session import Session
from ovfast.bench.targets import Target
from ovfast.errors import OptionError
from ovfast.ops import make_ops
from ovfast.storage import DTYPES

__all__ = ["open_bench", "run_kernels"]

MAX_SAMPLES = 30
MIN_SAMPLES = 5
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # more than the caches that others share with us


@dataclass(slots=True)
class _Timed:
    """A case on one back end, as far as it got."""

    variant: Variant
    work: Work
    moved_bytes: float
    samples: list[float]


def open_bench(target: Target, variant: Variant) -> Bench:
    """A back end of a target's device, with its sizes.

    Raises:
        OptionError: float8, whose weights are not those of every layer.
    """
    if variant.storage == "fp8":
        raise OptionError(
            "storage 'fp8' of single operations; it is of the language model's linear layers alone."
            " Use `ovfast bench latency --storage fp8`, or another storage."
        )
    ops = make_ops(target.device, variant.backend, threads=target.threads, storage=variant.storage)
    dtype = torch.float32 if ops.storage else DTYPES[variant.storage]
    return Bench(ops, target.config, dtype, target.device, variant.storage)


def run_kernels(
    session: Session,
    target: Target,
    bounds: Bounds,
    variants: Sequence[Variant],
    *,
    seconds: float,
) -> None:
    """Times all cases.

    Args:
        session: takes the rows.
        target: gives sizes, device and threads.
        bounds: floors.
        variants: back ends, each with how it keeps weights.
        seconds: for a case on one back end, at most; it gets 5 samples in any case.
    """
    torch.set_num_threads(target.threads)
    benches = {variant: open_bench(target, variant) for variant in variants}
    for case in op_cases(target.config):
        session.show(f"kernels, {case.name}")
        timed: list[_Timed] = []
        for variant, bench in benches.items():
            if bench.ops.where[case.operation] != variant.backend:
                continue  # it takes this one from the reference
            if not case.weights and any(one.variant.backend == variant.backend for one in timed):
                continue  # the same for every storage
            try:
                work = case.make(bench)
                work()
            except Exception as error:  # noqa: BLE001 - the next may still tell something
                session.add(_error_row(target, case, variant, f"{type(error).__name__}: {error}"))
                continue
            timed.append(_Timed(variant, work, case.moved_bytes(bench), []))
        _take_turns(timed, target.device, seconds)
        for one in timed:
            session.add(_row(target, bounds, case, one))


@torch.inference_mode()
def _take_turns(timed: Sequence[_Timed], device: torch.device, seconds: float) -> None:
    clock = _cuda_ms if device.type == "cuda" else _host_ms
    flush = torch.ones(FLUSH_BYTES[device.type] // 4, device=device)
    deadline = time.monotonic() + seconds * len(timed)
    for index in range(MAX_SAMPLES):
        if index >= MIN_SAMPLES and time.monotonic() > deadline:
            break
        for one in timed:
            flush.sum()
            one.samples.append(clock(one.work))


def _host_ms(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _head(target: Target, case: OpCase, variant: Variant) -> dict[str, Any]:
    return {
        "suite": "kernels",
        "workload": case.name,
        "side": "ovfast",
        "storage": variant.storage,
        "metric": "call_ms",
        "unit": "ms",
        "parameters": {
            "model": target.name,
            "backend": variant.backend,
            "device": target.device.type,
            "threads": target.threads,
        },
    }


def _row(target: Target, bounds: Bounds, case: OpCase, one: _Timed) -> Row:
    bound = bounds.work(one.variant.storage, case.flops, one.moved_bytes)
    head = _head(target, case, one.variant)
    return Row(**head, samples=tuple(one.samples), **bound.fields())


def _error_row(target: Target, case: OpCase, variant: Variant, error: str) -> Row:
    return Row(**_head(target, case, variant), samples=(), error=error[:500])
