"""Timing on a CUDA device: works taken in turn, of the device alone or as a caller waits for them.

`CudaTimer.device` is for kernels: nothing of the host is in its figures. `CudaTimer.host` is for
what users call: the host's checks and launches are in them, as they are in a request. What a figure
means is the caller's choice; the record of a run is `device_records`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ovfast.cuda_graphs import CudaCapture

Work = Callable[[], Any]
Samples = dict[str, list[float]]
FLUSH_BYTES = 256 << 20  # more than any L2: what a work reads is cold, as in a request
# The device spins so long ahead of a run, about 0.2 ms at 2 GHz and 1 ms: launching a graph takes
# 10 to 100 µs of the host, a call with its checks some 50 µs a kernel.
REPLAY_CYCLES, CALL_CYCLES = 400_000, 2_000_000


class CudaTimer:
    """Times works on the current CUDA device; a stand-in on a CPU has the same three methods."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def device(self, works: Mapping[str, Work], *, repeats: int = 30, warm: int = 3) -> Samples:
        """Milliseconds of the device alone, taken in turn (A B A B), the L2 flushed before each.

        A work is captured once and replayed, and the device is kept busy until the replay is
        queued: neither the host's launches nor its checks are in the figure.

        Args:
            works: name → what to time; the first calls compile and are not counted.
            repeats: counted runs of each.
            warm: calls of each before.
        """
        runs = {}
        capture = CudaCapture(torch.device("cuda"))
        for name, work in works.items():
            runs[name] = _captured(name, work, capture, warm)
            runs[name][0]()
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, (run, cycles) in runs.items():
                pairs[name].append(self._queue(run, cycles))
            torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) for start, end in taken] for name, taken in pairs.items()
        }

    def _queue(self, run: Work, cycles: int) -> tuple[Any, Any]:
        """Enqueues one run between two events; nothing waits for the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        self._flush.zero_()
        start.record()
        run()
        end.record()
        return start, end

    def captured(self, work: Work, warm: int = 3) -> Work:
        """A work as a graph to be replayed, for a race by the host's clock.

        Args:
            work: what to capture; where it cannot be, it is called instead.
            warm: calls before.
        """
        return _captured("work", work, CudaCapture(torch.device("cuda")), warm)[0]

    def host(self, works: Mapping[str, Work], *, repeats: int = 15, warm: int = 3) -> Samples:
        """Milliseconds by the host's clock from the call to the end of the device's work, in turn.

        Checks, launches and whatever else the host does are in the figure; nothing is flushed. A
        work that returns a float has timed itself, in milliseconds.

        Args:
            works: name → what to time.
            repeats: counted runs of each.
            warm: runs of each before.
        """
        return host_samples(works, repeats, warm, torch.cuda.synchronize)


def host_samples(
    works: Mapping[str, Work], repeats: int, warm: int, wait: Callable[[], Any]
) -> Samples:
    """The loop of `CudaTimer.host`; `wait` returns when the device has nothing left to do."""
    samples: Samples = {name: [] for name in works}
    for repeat in range(warm + repeats):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            own = work()
            wait()
            elapsed = 1e3 * (time.perf_counter() - start)
            if repeat >= warm:
                samples[name].append(own if isinstance(own, float) else elapsed)
    return samples


def _captured(name: str, work: Work, capture: CudaCapture, warm: int) -> tuple[Work, int]:
    """What to run for a work, and the cycles of the device that hide its launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a work sets up when first called is not captured
        for _ in range(max(1, warm)):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        graph = capture(work, None)
    except RuntimeError as error:
        print(f"{name} cannot be captured ({error}); it is called behind a busy device", flush=True)
        return work, CALL_CYCLES
    return lambda: graph.replay(None), REPLAY_CYCLES


def cycled(make: Callable[[int], Any], count: int) -> Iterator[Any]:
    """What `make` gives for 0…count - 1, made now, again and again."""
    made = [make(index) for index in range(count)]
    while True:
        yield from made
