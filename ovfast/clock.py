"""Times of stages without stopping the device: marks now, milliseconds later.

On a CPU a mark is the host's clock. On CUDA, where launches return before their work is done, it
is an event in the stream, so that a stage's time is the device's.
"""

import time
from dataclasses import dataclass

import torch

__all__ = ["Mark", "elapsed_ms", "mark"]


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a stream of work."""

    host_s: float
    event: torch.cuda.Event | None = None


def mark(device: torch.device) -> Mark:
    """The moment when what the device was given so far will be done."""
    if device.type != "cuda":
        return Mark(time.perf_counter())
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return Mark(time.perf_counter(), event)


def elapsed_ms(start: Mark, end: Mark) -> float:
    """Milliseconds between two marks; waits until the device has passed the second."""
    if start.event is None or end.event is None:
        return 1e3 * (end.host_s - start.host_s)
    end.event.synchronize()
    return float(start.event.elapsed_time(end.event))
