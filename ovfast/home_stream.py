"""The CUDA stream that all work of an engine runs on, whatever stream its callers are on.

Weights, cache and buffers are allocated on that stream and used there alone: so steps of several
threads follow one another, and memory that comes free is used again behind its last use. A caller
on another stream is kept in order with events: the step waits for what the caller's stream was
given before, and that stream for the step. On the same stream there is nothing to do.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["HomeStream"]

T = TypeVar("T")


class HomeStream:
    """The stream that is current when this is made; it must live as long.

    Args:
        device: of the engine; on a CPU there are no streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._home = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], T]) -> T:
        """Calls `work` with this stream current, in order with the caller's; the host never waits.

        Returns:
            What `work` returns. A tensor that it allocated is for later calls of `run` alone;
            what it wrote into the caller's tensors is there for the caller's stream.
        """
        home = self._home
        if home is None:
            return work()
        caller = torch.cuda.current_stream(self._device)
        if caller == home:
            return work()
        home.wait_stream(caller)
        try:
            with torch.cuda.stream(home):
                return work()
        finally:
            caller.wait_stream(home)
