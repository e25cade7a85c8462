"""The CUDA stream and device that all work of an engine runs on, wherever its callers are.

Weights, cache and buffers are allocated on that stream and used there alone: so steps of several
threads follow one another, and memory that comes free is used again behind its last use. A caller
on another stream is kept in order with events: the step waits for what the caller's stream was
given before, and that stream for the step. On the same stream there is nothing to do.

Each thread has a current device of its own, device 0 in a new one. Pinned buffers belong to it, and
every launch for another one changes it and back: so the engine's is current while it works.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

__all__ = ["HomeStream", "use_device"]

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
        """Calls `work` with this stream and its device current, in order with the caller's stream
        of that device; the host never waits.

        Returns:
            What `work` returns. A tensor that it allocated is for later calls of `run` alone;
            what it wrote into the caller's tensors is there for the caller's stream.
        """
        home = self._home
        if home is None:
            return work()
        with use_device(self._device):
            caller = torch.cuda.current_stream(self._device)
            if caller == home:
                return work()
            home.wait_stream(caller)
            try:
                with torch.cuda.stream(home):
                    return work()
            finally:
                caller.wait_stream(home)


def use_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device this thread's current one for the length of a `with`.

    Args:
        device: a CPU, or a CUDA device without an index, changes nothing.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
